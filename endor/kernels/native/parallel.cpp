// Chunks are handed out one by one, so it does not matter how many threads turn up: a team of one finishes too.
//
// Torch's OpenMP workers spin for a while after each of its own parallel regions. Threads of our own would compete with
// them for the cores (measured in docs/design/kernels.md), so the team is torch's own wherever its runtime is found.
// Except where we take the place of torch's operation, so that its workers have nothing to spin for.

#include "parallel.h"

#include <atomic>
#include <chrono>
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

// Threads that sleep between calls, started on the first one and never stopped.
class Pool {
   public:
    void run(int threads, Work& work) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn) return run_work(&work);  // another thread's call has the workers
        {
            std::lock_guard<std::mutex> lock(state_);
            while (started_ < threads - 1 && start_worker()) ++started_;
            work_ = &work;
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        run_work(&work);
        std::unique_lock<std::mutex> lock(state_);
        work_ = nullptr;
        lock.unlock();
        wait_briefly([this] { return busy_.load() == 0; });
        lock.lock();
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

    // Going to sleep and waking up take longer than a model takes from one weight to the next.
    template <class Condition>
    static void wait_briefly(Condition condition) {
        constexpr auto kPatience = std::chrono::microseconds(50);
        const auto deadline = std::chrono::steady_clock::now() + kPatience;
        while (!condition() && std::chrono::steady_clock::now() < deadline) {}
    }

    void worker() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            lock.unlock();
            wait_briefly([&] { return generation_.load() != seen; });
            lock.lock();
            wake_.wait(lock, [&] { return work_ != nullptr && generation_.load() != seen; });
            seen = generation_.load();
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
    std::atomic<uint64_t> generation_{0};
    int started_ = 0;
    std::atomic<int> busy_{0};
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

void run_chunks(int threads, int64_t chunks, ChunkBody body, void* context, Team team) {
    Work work{body, context, chunks};
    if (threads > chunks) threads = static_cast<int>(chunks);
    if (threads <= 1 || forked.load()) return run_work(&work);
    const OpenMpParallel parallel = team == Team::kTorch ? openmp.load() : nullptr;
    if (parallel) {
        parallel(run_work, &work, static_cast<unsigned>(threads), 0);
    } else {
        pool().run(threads, work);
    }
}

}  // namespace endor
