// A CUDA device of host memory, for a torch that was built without CUDA: what runs on it is computed by the CPU, but
// tensors have a device, and an operation that is given tensors of two devices fails as it does on a card.

#include <malloc.h>

#include <atomic>
#include <cstring>
#include <set>
#include <string>

#include <torch/extension.h>

#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;

namespace {

const Device CARD(c10::kCUDA, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);
std::atomic<int64_t> in_use{0};
int64_t memory = int64_t(8) << 30;

void release(void* data) {
  if (data) {
    in_use -= malloc_usable_size(data);
    free(data);
  }
}

// Fresh memory holds NaN; there is no more of it than a card has.
struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, CARD};
    TORCH_CHECK_WITH(OutOfMemoryError, in_use + int64_t(bytes) <= memory, "CUDA out of memory: ", bytes, " bytes");
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 512, bytes) == 0);
    memset(data, 0xFF, bytes);
    in_use += malloc_usable_size(data);
    return {data, data, &release, CARD};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
Memory allocator;
REGISTER_ALLOCATOR(c10::kCUDA, &allocator);

// One device, one stream, which has always caught up.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device) const override { return CARD; }
  Device getDevice() const override { return CARD; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, CARD); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, CARD); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

// torch looks for a class of this name.
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
  void deviceSynchronize(DeviceIndex) const override {}
};

// The same memory as a CPU tensor.
Tensor on_cpu(const Tensor& t) {
  if (!t.is_cuda()) return t;
  auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  Tensor same = t.numel() == 0
      ? at::empty_strided(t.sizes(), t.strides(), options)
      : at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), options);
  if (t.is_conj()) same = same.conj();
  return t.is_neg() ? same._neg_view() : same;
}

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Where = std::optional<Device>;
using Pinned = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;

Tensor empty(at::IntArrayRef size, Dtype dtype, Layout, Where, Pinned, Format format) {
  return at::detail::empty_generic(size, &allocator, KEYS, c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, Layout, Where, Pinned) {
  return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, c10::dtype_or_default(dtype));
}
Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  on_cpu(self).copy_(on_cpu(source));
  return self;
}
Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(self));
  return to;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}
at::Scalar local_scalar(const Tensor& t) { return on_cpu(t).item(); }
Tensor as_strided(const Tensor& t, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::cpu::as_strided(t, size, stride, offset);
}
const Tensor& resize_(const Tensor& t, c10::SymIntArrayRef size, Format format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}
Tensor& set_strided(Tensor& t, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::cpu::set_(t, storage, offset, size, stride);
}
Tensor& set_storage(Tensor& t, at::Storage storage) { return at::native::set_(t, storage); }
Tensor& set_tensor(Tensor& t, const Tensor& source) { return at::native::set_tensor_(t, source); }
Tensor view(const Tensor& t, at::IntArrayRef size) { return at::native::view(t, size); }
void record_stream(Tensor&, at::Stream) {}
bool is_pinned(const Tensor&, Where) { return false; }
// attention by its definition
int64_t attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                  std::optional<double>, bool) {
  return 0;
}

// Indices may lie on the CPU, and so may scalars.
const std::set<std::string> MIXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

void check(const c10::OperatorHandle& op, const Tensor& t) {
  TORCH_CHECK(!t.defined() || !t.device().is_cpu() || t.dim() == 0 || MIXED.count(op.schema().name()),
              "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
              op.schema().name(), ")");
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  size_t count = op.schema().arguments().size();
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    const c10::IValue& argument = (*stack)[i];
    if (argument.isTensor()) check(op, argument.toTensor());
    if (argument.isTensorList())
      for (const Tensor& t : argument.toTensorVector()) check(op, t);
  }
  at::native::cpu_fallback(op, stack);
}

// Memory of the card that somebody else keeps, as bytes.
Tensor wrap(int64_t address, int64_t bytes) {
  c10::DataPtr data(reinterpret_cast<void*>(address), CARD);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), &allocator, false);
  auto t = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), KEYS, c10::scalarTypeToTypeMeta(at::kByte));
  t.unsafeGetTensorImpl()->set_sizes_contiguous({bytes});
  return t;
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, ::Guard);
}
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &as_strided);
  m.impl("resize_", &resize_);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("view", &view);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", &set_strided);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_fused_sdp_choice", &attention);
  m.impl("record_stream", &record_stream);
  m.impl("is_pinned", &is_pinned);
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("in_use", [] { return in_use.load(); });
  m.def("memory", [] { return memory; });
  m.def("wrap", &wrap);
}
