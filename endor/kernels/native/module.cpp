// endor.kernels._native: addresses and sizes in, a number out. The caller (native_backend.py) has checked them.

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <memory>
#include <new>

#include "bitmap.h"
#include "exponent.h"
#include "matmul.h"
#include "parallel.h"
#include "quantized.h"
#include "quantized_encode.h"
#include "row_blocks.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the format is little-endian, and so are these kernels"
#endif

namespace {

using namespace endor;

constexpr int kIsaCount = 4;

const Kernels* kernels_at(int isa) {
    switch (isa) {
        case 0: return avx512_kernels();
        case 1: return avx2_kernels();
        case 2: return neon_kernels();
        case 3: return scalar_kernels();
        default: return nullptr;
    }
}

const Kernels* checked_kernels(int isa) {
    const Kernels* kernels = kernels_at(isa);
    if (!kernels) PyErr_Format(PyExc_ValueError, "this machine has no instruction set %d", isa);
    return kernels;
}

template <class T>
T* pointer(unsigned long long address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

PyObject* py_isas(PyObject*, PyObject*) {
    PyObject* isas = PyDict_New();
    for (int isa = 0; isas && isa < kIsaCount; ++isa) {
        if (const Kernels* kernels = kernels_at(isa)) {
            PyObject* index = PyLong_FromLong(isa);
            if (!index || PyDict_SetItemString(isas, kernels->name, index) < 0) Py_CLEAR(isas);
            Py_XDECREF(index);
        }
    }
    return isas;
}

bool parse_raw(PyObject* args, DecodeJob& job, int& isa, int& threads) {
    int offsets_are_64, streaming;
    long long rows, cols, row_block, nnz, start_block, stop_block;
    unsigned long long bitmap, offsets, values, out;
    if (!PyArg_ParseTuple(args, "iiLLLLiKKpKKLLp", &isa, &threads, &rows, &cols, &row_block, &nnz, &job.size_log2,
                          &bitmap, &offsets, &offsets_are_64, &values, &out, &start_block, &stop_block, &streaming)) {
        return false;
    }
    job.kernels = checked_kernels(isa);
    job.shape = {rows, cols, row_block};
    job.bitmap = pointer<const uint8_t>(bitmap);
    job.offsets = pointer<const void>(offsets);
    job.offsets_are_64 = offsets_are_64;
    job.values = pointer<const uint8_t>(values);
    job.nnz = nnz;
    job.out = pointer<uint8_t>(out);
    job.start_block = start_block;
    job.stop_block = stop_block;
    job.streaming = streaming;
    return job.kernels;
}

PyObject* py_decode(PyObject*, PyObject* args) {
    DecodeJob job{};
    int isa, threads;
    if (!parse_raw(args, job, isa, threads)) return nullptr;
    int64_t failure;
    Py_BEGIN_ALLOW_THREADS
    failure = decode(job, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failure);
}

PyObject* py_encode(PyObject*, PyObject* args) {
    EncodeJob job{};
    int isa;
    long long rows, cols, row_block;
    unsigned long long dense, bitmap, offsets, values;
    if (!PyArg_ParseTuple(args, "iiLLLiKKKK", &isa, &job.threads, &rows, &cols, &row_block, &job.size_log2, &dense,
                          &bitmap, &offsets, &values)) {
        return nullptr;
    }
    job.kernels = checked_kernels(isa);
    if (!job.kernels) return nullptr;
    job.shape = {rows, cols, row_block};
    job.dense = pointer<const uint8_t>(dense);
    job.bitmap = pointer<uint8_t>(bitmap);
    job.offsets = pointer<int64_t>(offsets);
    job.values = pointer<uint8_t>(values);
    int64_t nnz;
    Py_BEGIN_ALLOW_THREADS
    nnz = encode(job);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(nnz);
}

// What all codecs but raw share: (isa, threads, rows, cols, row block, nnz, log2 of the element size, bitmap, row offsets
// or 0 under mask `dense`, whether they have 64 bits, out, first and last row block, whether out is to bypass the caches).
bool parse_mask(PyObject* arguments, DecodeJob& job, int& isa, int& threads) {
    long long rows, cols, row_block, nnz, start_block, stop_block;
    unsigned long long bitmap, offsets, out;
    int offsets_are_64, streaming;
    if (!PyArg_ParseTuple(arguments, "iiLLLLiKKpKLLp", &isa, &threads, &rows, &cols, &row_block, &nnz, &job.size_log2,
                          &bitmap, &offsets, &offsets_are_64, &out, &start_block, &stop_block, &streaming)) {
        return false;
    }
    job.kernels = checked_kernels(isa);
    job.shape = {rows, cols, row_block};
    job.bitmap = pointer<const uint8_t>(bitmap);
    job.offsets = pointer<const void>(offsets);
    job.offsets_are_64 = offsets_are_64;
    job.nnz = nnz;
    job.out = pointer<uint8_t>(out);
    job.start_block = start_block;
    job.stop_block = stop_block;
    job.streaming = streaming;
    return job.kernels;
}

const ExponentKernels* exponent_kernels_at(int isa) {
    const ExponentKernels* kernels = isa == 0 ? avx512_exponent_kernels() : isa == 1 ? avx2_exponent_kernels() : nullptr;
    return kernels ? kernels : scalar_exponent_kernels();
}

bool parse_exponent(PyObject* args, ExponentDecodeJob& job, int& threads) {
    PyObject* mask;
    int isa, float16, record_offsets_are_64;
    long long exponent_bytes;
    unsigned long long record_offsets, records, sign_mantissa, mantissa_low;
    if (!PyArg_ParseTuple(args, "O!iipKpKLKK", &PyTuple_Type, &mask, &job.levels.pairs, &job.levels.singles, &float16,
                          &record_offsets, &record_offsets_are_64, &records, &exponent_bytes, &sign_mantissa,
                          &mantissa_low) ||
        !parse_mask(mask, job.mask, isa, threads)) {
        return false;
    }
    job.kernels = exponent_kernels_at(isa);
    job.float16 = float16;
    job.record_offsets = pointer<const void>(record_offsets);
    job.record_offsets_are_64 = record_offsets_are_64;
    job.records = pointer<const uint8_t>(records);
    job.exponent_bytes = exponent_bytes;
    job.sign_mantissa = pointer<const uint8_t>(sign_mantissa);
    job.mantissa_low = pointer<const uint8_t>(mantissa_low);
    return true;
}

PyObject* py_decode_exponent(PyObject*, PyObject* args) {
    ExponentDecodeJob job{};
    int threads;
    if (!parse_exponent(args, job, threads)) return nullptr;
    int64_t failure;
    Py_BEGIN_ALLOW_THREADS
    failure = decode_exponent(job, threads);
    Py_END_ALLOW_THREADS
    return failure == kNoMemory ? PyErr_NoMemory() : PyLong_FromLongLong(failure);
}

// (threads, rows, cols, row block, values before each row block, values, whether they are float16)
bool parse_exponent_job(PyObject* arguments, ExponentEncodeJob& job) {
    long long rows, cols, row_block;
    unsigned long long starts, values;
    int float16;
    if (!PyArg_ParseTuple(arguments, "iLLLKKp", &job.threads, &rows, &cols, &row_block, &starts, &values, &float16)) {
        return false;
    }
    job.shape = {rows, cols, row_block};
    job.starts = pointer<const int64_t>(starts);
    job.values = pointer<const uint16_t>(values);
    job.float16 = float16;
    return true;
}

PyObject* py_exponent_split(PyObject*, PyObject* args) {
    ExponentEncodeJob job{};
    PyObject* common;
    unsigned long long histograms, sign_mantissa, mantissa_low;
    if (!PyArg_ParseTuple(args, "O!KKK", &PyTuple_Type, &common, &histograms, &sign_mantissa, &mantissa_low) ||
        !parse_exponent_job(common, job)) {
        return nullptr;
    }
    Py_BEGIN_ALLOW_THREADS
    exponent_histograms(job, pointer<int64_t>(histograms));
    exponent_heads(job, pointer<uint8_t>(sign_mantissa), pointer<uint8_t>(mantissa_low));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* py_exponent_records(PyObject*, PyObject* args) {
    ExponentEncodeJob job{};
    PyObject* common;
    Levels levels;
    unsigned long long tables, record_offsets, scratch, records;
    if (!PyArg_ParseTuple(args, "O!iiKKKK", &PyTuple_Type, &common, &levels.pairs, &levels.singles, &tables,
                          &record_offsets, &scratch, &records) ||
        !parse_exponent_job(common, job)) {
        return nullptr;
    }
    Py_BEGIN_ALLOW_THREADS
    exponent_records(job, levels, pointer<const uint8_t>(tables), pointer<const int64_t>(record_offsets),
                     pointer<uint8_t>(scratch), pointer<uint8_t>(records));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

const QuantizedKernels* quantized_kernels_at(int isa) {
    const QuantizedKernels* kernels =
        isa == 0 ? avx512_quantized_kernels() : isa == 1 ? avx2_quantized_kernels() : nullptr;
    return kernels ? kernels : scalar_quantized_kernels();
}

bool parse_quantized(PyObject* args, QuantizedDecodeJob& job, int& threads) {
    PyObject* mask;
    int isa, int4, type;
    long long group_columns;
    unsigned long long codes, codebook, scales;
    if (!PyArg_ParseTuple(args, "O!piLKKK", &PyTuple_Type, &mask, &int4, &type, &group_columns, &codes, &codebook,
                          &scales) ||
        !parse_mask(mask, job.mask, isa, threads)) {
        return false;
    }
    job.kernels = quantized_kernels_at(isa);
    job.int4 = int4;
    job.type = static_cast<FloatType>(type);
    job.codes = pointer<const uint8_t>(codes);
    job.codebook = pointer<const int8_t>(codebook);
    job.scales = pointer<const uint16_t>(scales);
    job.group_columns = group_columns;
    return true;
}

PyObject* py_decode_quantized(PyObject*, PyObject* args) {
    QuantizedDecodeJob job{};
    int threads;
    if (!parse_quantized(args, job, threads)) return nullptr;
    int64_t failure;
    Py_BEGIN_ALLOW_THREADS
    failure = decode_quantized(job, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failure);
}

const QuantizeKernels* quantize_kernels_at(int isa) {
    const QuantizeKernels* kernels = isa == 0 ? avx512_quantize_kernels() : isa == 1 ? avx2_quantize_kernels() : nullptr;
    return kernels ? kernels : scalar_quantize_kernels();
}

// (isa, threads, rows, cols, row block, type, dense)
bool parse_quantized_job(PyObject* arguments, QuantizedEncodeJob& job) {
    int isa, type;
    long long rows, cols, row_block;
    unsigned long long dense;
    if (!PyArg_ParseTuple(arguments, "iiLLLiK", &isa, &job.threads, &rows, &cols, &row_block, &type, &dense)) return false;
    job.bits = checked_kernels(isa);
    job.kernels = quantize_kernels_at(isa);
    job.shape = {rows, cols, row_block};
    job.type = static_cast<FloatType>(type);
    job.dense = pointer<const uint8_t>(dense);
    return job.bits;
}

PyObject* py_quantized_mask(PyObject*, PyObject* args) {
    QuantizedEncodeJob job{};
    PyObject* common;
    unsigned long long bitmap, starts;
    if (!PyArg_ParseTuple(args, "O!KK", &PyTuple_Type, &common, &bitmap, &starts) || !parse_quantized_job(common, job)) {
        return nullptr;
    }
    Py_BEGIN_ALLOW_THREADS
    scan_mask(job, pointer<uint8_t>(bitmap), pointer<int64_t>(starts));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* py_encode_quantized(PyObject*, PyObject* args) {
    QuantizedEncodeJob job{};
    PyObject* common;
    int int4;
    unsigned long long bitmap, starts, factors, codebook, scales, codes;
    if (!PyArg_ParseTuple(args, "O!pKKKifKKK", &PyTuple_Type, &common, &int4, &bitmap, &starts, &factors,
                          &job.factor_count, &job.highest_scale, &codebook, &scales, &codes) ||
        !parse_quantized_job(common, job)) {
        return nullptr;
    }
    if (job.factor_count < 1 || job.factor_count > kMaxFactors) {
        return PyErr_Format(PyExc_ValueError, "%d factors, expected 1 to %d", job.factor_count, kMaxFactors);
    }
    job.int4 = int4;
    job.bitmap = pointer<const uint8_t>(bitmap);
    job.starts = pointer<const int64_t>(starts);
    job.factors = pointer<const float>(factors);
    job.codebook = pointer<const int8_t>(codebook);
    job.scales = pointer<uint16_t>(scales);
    job.codes = pointer<uint8_t>(codes);
    bool finite;
    Py_BEGIN_ALLOW_THREADS
    finite = encode_quantized(job);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(finite);
}

const MatmulKernels* matmul_kernels_at(int isa, bool fp32) {
    switch (isa) {
        case 0: return avx512bf16_matmul(fp32);
        case 1: return avx512_matmul(fp32);
        case 2: return avx2_matmul(fp32);
        case 3: return scalar_matmul(fp32);
        default: return nullptr;
    }
}

PyObject* py_matmul_isas(PyObject*, PyObject*) {
    static const char* const names[] = {"avx512bf16", "avx512", "avx2", "scalar"};
    PyObject* isas = PyDict_New();
    for (int isa = 0; isas && isa < kIsaCount; ++isa) {
        if (!matmul_kernels_at(isa, false)) continue;
        PyObject* index = PyLong_FromLong(isa);
        if (!index || PyDict_SetItemString(isas, names[isa], index) < 0) Py_CLEAR(isas);
        Py_XDECREF(index);
    }
    return isas;
}

// A product takes what decoding the same tensor takes; `out`, the row blocks and the streaming are not used.
struct Operand {
    DecodeJob raw{};
    ExponentDecodeJob exponent{};
    QuantizedDecodeJob quantized{};
};

bool parse_operand(int codec, PyObject* args, Operand& operand, MatmulJob& job, int& threads) {
    int isa;
    if (codec == 0) {
        if (!parse_raw(args, operand.raw, isa, threads)) return false;
        job.mask = operand.raw;
        job.source = kRawValues;
        job.values.data = job.mask.values;
        job.values.end = job.mask.values + 2 * job.mask.nnz;
    } else if (codec == 1) {
        if (!parse_exponent(args, operand.exponent, threads)) return false;
        operand.exponent.mask.streaming = false;
        job.mask = operand.exponent.mask;
        // Without gaps decoding has a simpler loop: a head of 32000 x 2048 takes 2.9 ms by decoded rows, 5.3 by records.
        job.source = operand.exponent.mask.offsets ? kRecords : kDecodedRows;
        job.exponent = &operand.exponent;
        job.decoder = decode_exponent_block;
        job.decoder_context = &operand.exponent;
    } else {
        QuantizedDecodeJob& from = operand.quantized;
        if (!parse_quantized(args, from, threads)) return false;
        from.mask.streaming = false;
        const Shape& shape = from.mask.shape;
        const int64_t groups = (shape.cols + from.group_columns - 1) / from.group_columns;
        job.mask = from.mask;
        job.source = from.int4 ? kInt4Values : kInt8Values;
        job.values = {from.codes, from.codes + (from.int4 ? (from.mask.nnz + 1) / 2 : from.mask.nnz),
                      from.group_columns / kWordBits, from.codebook, from.scales, groups};
        job.decoder = decode_quantized_block;
        job.decoder_context = &from;
    }
    return true;
}

PyObject* py_matmul(PyObject*, PyObject* args) {
    MatmulJob job{};
    Operand operand;
    PyObject* operand_args;
    int isa, codec, threads, of_operand, fp32;
    long long x_rows;
    unsigned long long x, bias, y;
    if (!PyArg_ParseTuple(args, "iiO!iLpKKK", &isa, &codec, &PyTuple_Type, &operand_args, &threads, &x_rows, &fp32, &x,
                          &bias, &y) ||
        !parse_operand(codec, operand_args, operand, job, of_operand)) {
        return nullptr;
    }
    job.kernels = matmul_kernels_at(isa, fp32);
    if (!job.kernels) return PyErr_Format(PyExc_ValueError, "this machine has no matmul %d", isa);
    job.x = pointer<const void>(x);
    job.x_rows = x_rows;
    job.bias = pointer<const float>(bias);
    job.y = pointer<void>(y);
    int64_t failure;
    Py_BEGIN_ALLOW_THREADS
    const std::unique_ptr<uint8_t[]> scratch(new (std::nothrow) uint8_t[matmul_scratch_bytes(x_rows, job.mask.shape.cols)]);
    job.scratch = scratch.get();
    failure = scratch ? matmul(job, threads) : kNoMemory;
    Py_END_ALLOW_THREADS
    return failure == kNoMemory ? PyErr_NoMemory() : PyLong_FromLongLong(failure);
}

PyObject* py_set_openmp(PyObject*, PyObject* args) {
    unsigned long long address;
    if (!PyArg_ParseTuple(args, "K", &address)) return nullptr;
    set_openmp(reinterpret_cast<OpenMpParallel>(static_cast<uintptr_t>(address)));
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isas", py_isas, METH_NOARGS, "Instruction sets of this machine, fastest first, and their numbers."},
    {"decode", py_decode, METH_VARARGS, "Decode row blocks; -1, or 4 * row block + rule broken."},
    {"encode", py_encode, METH_VARARGS, "Write bitmap, int64 row offsets and values of a matrix; the number of values."},
    {"decode_exponent", py_decode_exponent, METH_VARARGS, "As decode, for codec exponent under any mask."},
    {"exponent_split", py_exponent_split, METH_VARARGS, "Histograms of exponents, and everything but exponents."},
    {"exponent_records", py_exponent_records, METH_VARARGS, "Write all records of codec exponent."},
    {"decode_quantized", py_decode_quantized, METH_VARARGS, "As decode, for codecs int8 and int4 under any mask."},
    {"quantized_mask", py_quantized_mask, METH_VARARGS, "Write the bitmap and the int64 row offsets of a matrix."},
    {"encode_quantized", py_encode_quantized, METH_VARARGS, "Write scales and codes; False for NaN or infinity."},
    {"matmul_isas", py_matmul_isas, METH_NOARGS, "Instruction sets of matmul, fastest first, and their numbers."},
    {"matmul", py_matmul, METH_VARARGS, "y = x W^T + bias; -1, or 4 * row block + rule broken."},
    {"set_openmp", py_set_openmp, METH_VARARGS, "Use the OpenMP runtime with this GOMP_parallel; 0: own threads."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "C++ kernels over raw addresses; use endor.kernels instead.", -1, methods,
    nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
