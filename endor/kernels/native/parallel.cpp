// Chunks are handed out one by one, so it does not matter how many threads turn up: a team of one finishes too.
//
// Torch's OpenMP workers spin for a while after each of its own parallel regions. Threads of our own would compete with
// them for the cores (measured in docs/design/kernels.md), so the team is torch's own wherever its runtime is found.

#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define ENDOR_HAS_FORK 1
#endif

namespace endor {
namespace {

std::atomic<OpenMpParallel> openmp{nullptr};
// After a fork neither OpenMP's workers nor ours exist in the child, but both runtimes believe they do.
std::atomic<bool> forked{false};

struct Work {
    ChunkBody body;
    void* context;
    int64_t chunks;
    std::atomic<int64_t> next{0};
};

void run_work(void* argument) {
    auto& work = *static_cast<Work*>(argument);
    for (int64_t chunk; (chunk = work.next.fetch_add(1, std::memory_order_relaxed)) < work.chunks;) {
        work.body(work.context, chunk);
    }
}

// The fallback: threads that sleep between calls, started on the first one and never stopped.
class Pool {
   public:
    void run(int threads, Work& work) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn) return run_work(&work);  // another thread's call has the workers
        {
            std::lock_guard<std::mutex> lock(state_);
            while (started_ < threads - 1 && start_worker()) ++started_;
            work_ = &work;
            ++generation_;
        }
        wake_.notify_all();
        run_work(&work);
        std::unique_lock<std::mutex> lock(state_);
        work_ = nullptr;
        idle_.wait(lock, [this] { return busy_ == 0; });
    }

   private:
    bool start_worker() {
        try {
            std::thread([this] { worker(); }).detach();
            return true;
        } catch (const std::system_error&) {
            return false;  // no more threads to be had: work with those there are
        }
    }

    void worker() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            wake_.wait(lock, [&] { return work_ != nullptr && generation_ != seen; });
            seen = generation_;
            Work* work = work_;
            ++busy_;
            lock.unlock();
            run_work(work);
            lock.lock();
            if (--busy_ == 0) idle_.notify_one();
        }
    }

    std::mutex turn_;
    std::mutex state_;
    std::condition_variable wake_;
    std::condition_variable idle_;
    Work* work_ = nullptr;
    uint64_t generation_ = 0;
    int started_ = 0;
    int busy_ = 0;
};

// Never destroyed: its workers may outlive every static object.
Pool& pool() {
    static Pool* const instance = new Pool;
    return *instance;
}

#if ENDOR_HAS_FORK
const int fork_hook = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif

}  // namespace

void set_openmp(OpenMpParallel parallel) { openmp.store(parallel); }

void run_chunks(int threads, int64_t chunks, ChunkBody body, void* context) {
    Work work{body, context, chunks};
    if (threads > chunks) threads = static_cast<int>(chunks);
    if (threads <= 1 || forked.load()) return run_work(&work);
    if (const OpenMpParallel parallel = openmp.load()) {
        parallel(run_work, &work, static_cast<unsigned>(threads), 0);
    } else {
        pool().run(threads, work);
    }
}

}  // namespace endor
