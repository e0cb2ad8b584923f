/* Preloaded in front of the C library: reads of a file named FAULT.faulty fail in the way the name says, and reads of
 * any other file FILE in the way the file FILE.fault says, as long as it is there.
 *
 *   eio@OFFSET   a read of the byte at OFFSET fails with EIO, as from a bad sector
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

/* The fault that a descriptor's file is named after or has beside it, or "". */
static const char *fault_of(int descriptor, char path[4096]) {
    static const char suffix[] = ".faulty", beside[] = ".fault";
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, 4096 - sizeof beside);
    if (length < 7) return "";
    path[length] = 0;
    if (strcmp(path + length - 7, suffix) == 0) {
        path[length - 7] = 0;
        char *name = strrchr(path, '/');
        return name ? name + 1 : path;
    }
    strcpy(path + length, beside);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return "";
    length = read(file, path, 4095);
    close(file);
    path[length < 0 ? 0 : length] = 0;
    return path;
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
        off_t bad = atoll(fault + 4);
        if (offset <= bad && bad < offset + (off_t)vector.iov_len) { errno = EIO; return -1; }
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
