/* Preloaded in front of the C library: reads of a file named FAULT.faulty fail in the way the name says.
 *
 *   eio@OFFSET   a read that reaches OFFSET fails with EIO, as from a bad sector
 *   short        at most 1000 bytes (buffered) or one page (direct) come at a time
 *   einval       direct reads are refused though the file opened, as on some network file systems
 *   slow         every read takes 50 ms longer
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* The fault that a descriptor's file is named after, or "". */
static const char *fault_of(int descriptor, char path[4096]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, 4095);
    if (length < 7 || memcmp(path + length - 7, ".faulty", 7) != 0) return "";
    path[length - 7] = 0;
    char *name = strrchr(path, '/');
    return name ? name + 1 : path;
}

static ssize_t read_faulty(int descriptor, const struct iovec *vectors, int count, off_t offset, int flags) {
    static ssize_t (*next)(int, const struct iovec *, int, off_t, int);
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, "preadv64v2");
    char path[4096];
    const char *fault = fault_of(descriptor, path);
    if (count != 1 || !*fault) return next(descriptor, vectors, count, offset, flags);
    int direct = (fcntl(descriptor, F_GETFL) & O_DIRECT) != 0;
    struct iovec vector = vectors[0];
    if (strncmp(fault, "eio@", 4) == 0) {
        if (offset + (off_t)vector.iov_len > atoll(fault + 4)) { errno = EIO; return -1; }
    } else if (strcmp(fault, "short") == 0) {
        size_t most = direct ? 4096 : 1000;
        if (vector.iov_len > most) vector.iov_len = most;
    } else if (strcmp(fault, "einval") == 0) {
        if (direct) { errno = EINVAL; return -1; }
    } else if (strcmp(fault, "slow") == 0) {
        usleep(50000);
    }
    return next(descriptor, &vector, 1, offset, flags);
}

/* What kvikio calls. */
ssize_t pread(int descriptor, void *memory, size_t length, off_t offset) {
    struct iovec vector = {memory, length};
    return read_faulty(descriptor, &vector, 1, offset, 0);
}

ssize_t pread64(int descriptor, void *memory, size_t length, off_t offset) {
    return pread(descriptor, memory, length, offset);
}

/* Python calls the one with flags where the C library has it. */
ssize_t preadv(int descriptor, const struct iovec *vectors, int count, off_t offset) {
    return read_faulty(descriptor, vectors, count, offset, 0);
}

ssize_t preadv64(int descriptor, const struct iovec *vectors, int count, off_t offset) {
    return read_faulty(descriptor, vectors, count, offset, 0);
}

ssize_t preadv2(int descriptor, const struct iovec *vectors, int count, off_t offset, int flags) {
    return read_faulty(descriptor, vectors, count, offset, flags);
}

ssize_t preadv64v2(int descriptor, const struct iovec *vectors, int count, off_t offset, int flags) {
    return read_faulty(descriptor, vectors, count, offset, flags);
}
