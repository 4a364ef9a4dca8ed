// A pretend GPU for PyTorch: CUDA tensors in the host's memory, with every op run by the CPU's kernel.
//
// Preload it before libtorch looks for a provider of CUDA. It fails where programs fail on a GPU: an op on tensors of
// both devices is an error, and uninitialized memory holds large numbers, not zeros.

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

const c10::Device kGpu(c10::DeviceType::CUDA, 0);
const c10::DispatchKeySet kCpuKeys(c10::DispatchKey::CPU), kGpuKeys(c10::DispatchKey::CUDA);

// ------------------------------------------------------------------------------------------ device, streams, hooks

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kGpu; }
  c10::Device getDevice() const override { return kGpu; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// PyTorch looks for hooks of this name.
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex current_device() const override { return 0; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  at::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  void setCurrentDevice(at::DeviceIndex) const override {}
  at::DeviceIndex exchangeDevice(at::DeviceIndex) const override { return 0; }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex) const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

// ---------------------------------------------------------------------------------------------------------- memory

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (data != nullptr) {
      std::memset(data, 0x7f, bytes);  // 3e38 in fp32 and bf16, nan in fp16, and no index of anything
    }
    return {data, data, &std::free, kGpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;
const bool memory_is_set = (c10::SetAllocator(c10::DeviceType::CUDA, &memory, 10), true);

// The same memory as a tensor of another device.
at::Tensor alias(const at::Tensor& tensor, c10::Device device, c10::DispatchKeySet keys, c10::Allocator* allocator) {
  auto* owner = new c10::Storage(tensor.storage());
  at::DataPtr data(owner->mutable_data(), owner, [](void* p) { delete static_cast<c10::Storage*>(p); }, device);
  c10::Storage storage(c10::Storage::use_byte_size_t(), owner->nbytes(), std::move(data), allocator, true);
  auto result = at::detail::make_tensor<at::TensorImpl>(std::move(storage), keys, tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    result.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  return result;
}
at::Tensor on_cpu(const at::Tensor& tensor) {
  const bool there = !tensor.defined() || tensor.is_cpu();
  return there ? tensor : alias(tensor, c10::kCPU, kCpuKeys, c10::GetAllocator(c10::DeviceType::CPU));
}
at::Tensor on_gpu(const at::Tensor& tensor) {
  return !tensor.defined() || tensor.is_cuda() ? tensor : alias(tensor, kGpu, kGpuKeys, &memory);
}

// ------------------------------------------------------------------------------------------------------- operators

// Run any op by the CPU's kernel, on aliases of its tensors.
void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::vector<std::pair<at::Tensor, at::Tensor>> given;  // (alias, original)
  const auto take = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) {
      return tensor;
    }
    // 0-dim tensors may be on the host: PyTorch passes them as arguments of a kernel.
    TORCH_CHECK(tensor.is_cuda() || tensor.dim() == 0, op.operator_name().name, " got tensors of both devices: ",
                tensor.sizes(), " is on the CPU");
    auto result = on_cpu(tensor);
    given.emplace_back(result, tensor);
    return result;
  };
  const auto give = [&](const at::Tensor& tensor) {
    for (const auto& [ours, original] : given) {
      if (ours.is_same(tensor)) {
        return original;
      }
    }
    return on_gpu(tensor);
  };
  const auto each = [](c10::IValue& value, const auto& change) {
    c10::List<at::Tensor> result;
    for (const auto& tensor : value.toTensorVector()) {
      result.push_back(change(tensor));
    }
    value = result;
  };

  const auto first = stack->size() - op.schema().arguments().size();
  for (auto k = first; k < stack->size(); ++k) {
    auto& value = (*stack)[k];
    if (value.isTensor()) {
      value = take(value.toTensor());
    } else if (value.isTensorList()) {
      each(value, take);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> result;
      for (const auto& tensor : value.toOptionalTensorVector()) {  // indices, which may be on the host
        const bool ours = tensor.has_value() && tensor->defined() && tensor->is_cuda();
        result.push_back(ours ? std::optional(take(*tensor)) : tensor);
      }
      value = result;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = c10::Device(c10::kCPU);
    }
  }
  op.redispatchBoxed(kCpuKeys, stack);
  for (const auto& [ours, original] : given) {
    if (!ours.sizes().equals(original.sizes())) {  // a given output, which was resized
      auto* impl = original.unsafeGetTensorImpl();
      impl->set_storage_keep_dtype(on_gpu(ours).storage());
      impl->set_sizes_and_strides(ours.sizes(), ours.strides(), ours.storage_offset());
    }
  }
  for (auto k = stack->size() - op.schema().returns().size(); k < stack->size(); ++k) {
    auto& value = (*stack)[k];
    if (value.isTensor()) {
      value = give(value.toTensor());
    } else if (value.isTensorList()) {
      each(value, give);
    }
  }
}

using Type = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Device = std::optional<at::Device>;
using Flag = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;

at::Tensor empty(c10::SymIntArrayRef size, Type type, Layout, Device, Flag, Format format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, kGpuKeys, c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Type type, Layout, Device, Flag) {
  return at::detail::empty_strided_generic(size, stride, &memory, kGpuKeys, c10::dtype_or_default(type));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool) {
  on_cpu(self).copy_(on_cpu(source));
  return self;
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, Format format) {
  const auto fresh = at::empty(size, self.options(), format);
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
  self.unsafeGetTensorImpl()->set_sizes_and_strides(fresh.sizes(), fresh.strides(), 0);
  return self;
}

// Use the math implementation of attention, which is number 0 in PyTorch.
int64_t attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
                  std::optional<double>, bool) {
  return 0;
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("_fused_sdp_choice", TORCH_FN(attention));
  // Ops that PyTorch would otherwise compose from those of a GPU's libraries.
  for (const auto* name : {"convolution", "convolution_backward", "native_group_norm", "native_group_norm_backward",
                           "native_layer_norm", "native_layer_norm_backward", "native_batch_norm", "mse_loss"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
  }
}
