// Run the chunks of one operation on several threads: those of torch's OpenMP runtime where it has one.

#pragma once

#include <cstdint>

namespace endor {

using ChunkBody = void (*)(void* context, int64_t chunk);

// libgomp's entry point; LLVM's and Intel's OpenMP runtimes have it under the same name.
using OpenMpParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Hand over the entry point of the OpenMP runtime that torch uses; null: back to our own threads.
void set_openmp(OpenMpParallel parallel);

enum class Team {
    kTorch,  // torch's OpenMP, where it is known: does not compete with torch's own operations
    kOwn,    // ours: whoever is not running when the work is done is not waited for
};

// Call body(context, chunk) once for every chunk in [0, chunks), on up to `threads` threads, and wait.
void run_chunks(int threads, int64_t chunks, ChunkBody body, void* context, Team team = Team::kTorch);

}  // namespace endor
