// A fake accelerator: a PrivateUse1 device whose memory is host malloc and whose operations are the CPU's. Two devices.
#include <torch/extension.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/InferSize.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/Allocator.h>
#include <atomic>
#include <mutex>
#include <unordered_map>
#include <torch/csrc/jit/runtime/operator.h>

static constexpr int NDEV = 2;
static thread_local int cur = 0;
static std::atomic<int64_t> used[NDEV];
static std::atomic<int64_t> h2d_bytes{0}, d2h_bytes{0}, h2d_n{0}, allocs{0};
static std::atomic<int64_t> peak[NDEV];
static std::atomic<int64_t> limit_{INT64_MAX};
static std::mutex mu; static std::unordered_map<void*, std::pair<int,size_t>> live;

struct A final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    int d = cur; void* p = nullptr;
    if (n) { TORCH_CHECK_WITH(OutOfMemoryError, used[d] + (int64_t)n <= limit_, "fakedev out of memory. tried ", n, " used ", used[d].load()); if (posix_memalign(&p, 64, n)) throw std::bad_alloc(); std::lock_guard<std::mutex> g(mu); live[p] = {d, n}; int64_t u = (used[d] += n); if (u > peak[d]) peak[d] = u; allocs++; }
    return {p, p, &del, c10::Device(c10::DeviceType::PrivateUse1, d)};
  }
  static void del(void* p) { if (!p) return; { std::lock_guard<std::mutex> g(mu); auto it = live.find(p); if (it != live.end()) { used[it->second.first] -= it->second.second; live.erase(it);} } free(p); }
  c10::DeleterFnPtr raw_deleter() const override { return &del; }
  void copy_data(void* d, const void* s, std::size_t n) const override { memcpy(d, s, n); }
};
static A alloc_;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &alloc_);

struct G final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device d) const override { auto o = getDevice(); cur = d.has_index() ? d.index() : 0; return o; }
  c10::Device getDevice() const override { return {c10::DeviceType::PrivateUse1, (c10::DeviceIndex)cur}; }
  void setDevice(c10::Device d) const override { cur = d.has_index() ? d.index() : 0; }
  void uncheckedSetDevice(c10::Device d) const noexcept override { cur = d.has_index() ? d.index() : 0; }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getNewStream(c10::Device d, int) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return NDEV; }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, G);

struct H final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return NDEV; }
  c10::DeviceIndex getCurrentDevice() const override { return cur; }
  void setCurrentDevice(c10::DeviceIndex i) const override { cur = i; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex i) const override { auto o = cur; cur = i; return o; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex i) const override { auto o = cur; if (i >= 0) cur = i; return o; }
  at::Device getDeviceFromPtr(void* p) const override { std::lock_guard<std::mutex> g(mu); auto it = live.find(p); return {c10::DeviceType::PrivateUse1, (c10::DeviceIndex)(it == live.end() ? 0 : it->second.first)}; }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto* si = s.unsafeGetStorageImpl(); c10::DeviceGuard g(si->device()); auto p = alloc_.allocate(n); size_t k = std::min(n, si->nbytes()); if (k) memcpy(p.get(), si->data(), k); si->set_data_ptr_noswap(std::move(p)); si->set_nbytes(n); }
  bool isPinnedPtr(const void*) const override { return false; }
};
static H hooks_;

using at::Tensor;
static c10::Device dev(std::optional<c10::Device> d) { if (d && d->has_index()) return *d; return {c10::DeviceType::PrivateUse1, (c10::DeviceIndex)cur}; }
static Tensor empty_mf(c10::IntArrayRef s, std::optional<at::ScalarType> dt, std::optional<at::Layout>, std::optional<c10::Device> d, std::optional<bool>, std::optional<at::MemoryFormat> mf) {
  auto D = dev(d); c10::DeviceGuard g(D);
  return at::detail::empty_generic(s, &alloc_, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dt), mf);
}
static Tensor empty_st(c10::IntArrayRef s, c10::IntArrayRef st, std::optional<at::ScalarType> dt, std::optional<at::Layout>, std::optional<c10::Device> d, std::optional<bool>) {
  auto D = dev(d); c10::DeviceGuard g(D);
  return at::detail::empty_strided_generic(s, st, &alloc_, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dt));
}
static Tensor as_cpu(const Tensor& t) { // CPU alias of the same bytes
  if (t.device().is_cpu()) return t;
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), at::TensorOptions().dtype(t.scalar_type()));
}
static Tensor copy_from(const Tensor& src, const Tensor& dst, bool) {
  if (src.device().is_cpu() && !dst.device().is_cpu()) { h2d_bytes += src.nbytes(); h2d_n++; }
  if (!src.device().is_cpu() && dst.device().is_cpu()) d2h_bytes += src.nbytes();
  if (src.numel() == 0) return dst;
  as_cpu(dst).copy_(as_cpu(src)); return dst;
}
static Tensor copy_from_resize(const Tensor& src, const Tensor& dst) { dst.resize_(src.sizes()); return copy_from(src, dst, false); }
static at::Scalar lsd(const Tensor& t) { return at::_local_scalar_dense(as_cpu(t)); }
static const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto s = C10_AS_INTARRAYREF_SLOW(size); auto* ti = self.unsafeGetTensorImpl();
  int64_t n = 1; for (auto v : s) n *= v; size_t need = (n + self.storage_offset()) * self.itemsize();
  if (need > self.storage().nbytes()) hooks_.resizePrivateUse1Bytes(self.storage(), need);
  ti->set_sizes_contiguous(s); return self;
}
static Tensor& set_ss(Tensor& r, at::Storage st, int64_t off, c10::IntArrayRef sz, c10::IntArrayRef str) { return at::native::set_storage_cpu_(r, st, off, sz, str); }
static Tensor& set_s(Tensor& r, at::Storage st) { int64_t n = st.nbytes() / r.dtype().itemsize(); return at::native::set_storage_cpu_(r, st, 0, {n}, {}); }
static Tensor& set_t(Tensor& r, const Tensor& s) { return at::native::set_storage_cpu_(r, s.storage(), s.storage_offset(), s.sizes(), s.strides()); }
static Tensor view_(const Tensor& s, c10::IntArrayRef sz) { return at::native::view(s, sz); }
static Tensor ralias(const Tensor& s, c10::IntArrayRef sz, c10::IntArrayRef st) { return at::native::_reshape_alias(s, sz, st); }
static Tensor asst(const Tensor& s, c10::IntArrayRef sz, c10::IntArrayRef st, std::optional<int64_t> o) { return at::native::as_strided_tensorimpl(s, sz, st, o); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_mf); m.impl("empty_strided", &empty_st);
  m.impl("_copy_from", &copy_from); m.impl("_copy_from_and_resize", &copy_from_resize);
  m.impl("_local_scalar_dense", &lsd); m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_ss); m.impl("set_.source_Storage", &set_s); m.impl("set_.source_Tensor", &set_t);
  m.impl("view", &view_); m.impl("_reshape_alias", &ralias); m.impl("as_strided", &asst);
}
static void fb(const c10::OperatorHandle& op, c10::Stack* st) {
  // strict like a real accelerator: refuse to mix non-scalar CPU tensors (or two different fake devices) in one kernel
  auto& name = op.schema().name(); bool exempt = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" || name == "aten::copy_";
  if (!exempt) { int cpu = 0, d = -1; auto chk = [&](const Tensor& t) { if (!t.defined()) return; if (t.device().is_cpu()) { if (t.dim() > 0) cpu = 1; } else if (t.device().type() == c10::DeviceType::PrivateUse1) { TORCH_CHECK(d < 0 || d == t.device().index(), "Expected all tensors to be on the same device, but found fakedev:", d, " and fakedev:", (int)t.device().index(), " in ", name); d = t.device().index(); } };
    auto n = op.schema().arguments().size(); auto args = torch::jit::last(*st, n);
    for (auto& v : args) { if (v.isTensor()) chk(v.toTensor()); else if (v.isTensorList()) for (const auto& t : v.toTensorVector()) chk(t); }
    TORCH_CHECK(!(cpu && d >= 0), "Expected all tensors to be on the same device, but found at least two devices, cpu and fakedev:", d, "! (", name, ")"); }
  at::native::cpu_fallback(op, st);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fb>()); }

PYBIND11_MODULE(_fakedev, m) {
  m.def("init", [] { at::RegisterPrivateUse1HooksInterface(&hooks_); });
  m.def("device_count", [] { return NDEV; });
  m.def("current_device", [] { return cur; });
  m.def("set_device", [](int d) { cur = d; });
  m.def("memory_allocated", [](int d) { return used[d].load(); });
  m.def("max_memory_allocated", [](int d) { return peak[d].load(); });
  m.def("set_limit", [](int64_t v) { limit_ = v; });
  m.def("reset_peak", [](int d) { peak[d] = used[d].load(); });
  m.def("stats", [] { return std::map<std::string,int64_t>{{"h2d_bytes", h2d_bytes}, {"h2d_n", h2d_n}, {"d2h_bytes", d2h_bytes}, {"allocs", allocs}}; });
}
