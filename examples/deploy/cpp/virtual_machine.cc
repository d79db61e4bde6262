// Runs `model.so` with TVM's virtual machine.
#include <dlfcn.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "engine.h"

namespace ffi = tvm::ffi;

namespace {

constexpr size_t kLine = 64;  // TVM's tensors start at a cache line

struct HostMemory {
  void AllocData(DLTensor* tensor) {
    size_t bytes = std::max<size_t>(ffi::GetDataSize(*tensor), 1);
    tensor->data = std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine);
    if (tensor->data == nullptr) throw UserError("out of memory: " + std::to_string(bytes) + " bytes are wanted");
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

// Memory that belongs to a mapped file.
struct MappedMemory {
  StoredTensor source;
  void AllocData(DLTensor* tensor) { tensor->data = const_cast<char*>(source.data); }
  void FreeData(DLTensor*) {}
};

size_t Bytes(const ffi::Tensor& tensor) { return ffi::GetDataSize(tensor.numel(), tensor.dtype()); }

ffi::Tensor OnHost(const std::vector<int64_t>& shape, const std::string& dtype) {
  return ffi::Tensor::FromNDAlloc(HostMemory(), ffi::Shape(shape), ffi::StringToDLDataType(dtype), {kDLCPU, 0});
}

ffi::Function Global(const char* name) {
  std::optional<ffi::Function> found = ffi::Function::GetGlobal(name);
  if (!found) throw UserError(std::string("TVM's runtime has no function ") + name);
  return *found;
}

class VirtualMachine : public Engine {
 public:
  VirtualMachine(const std::filesystem::path& folder, const json::Object& manifest) {
    if (!Get<json::Array>(Get<json::Object>(manifest, "target"), "architectures").empty()) FindGpu();
    LoadLibrary(std::filesystem::absolute(folder / "model.so").string());
    LoadWeights(WeightFiles(folder, manifest), Get<json::Array>(manifest, "parameters"));
    MakeCaches(Get<json::Object>(manifest, "cache"));
  }

  std::vector<float> Run(const std::vector<int64_t>& ids, int64_t first) override {
    std::vector<int64_t> positions;
    for (size_t i = 0; i < ids.size(); ++i) positions.push_back(first + i);
    ffi::Any result = main_(Put(ids), Put(positions), weights_, caches_);
    ffi::Tensor logits = result.cast<ffi::Array<ffi::Any>>()[0].cast<ffi::Tensor>();
    // [1, count, vocabulary], or the last position only.
    int64_t width = logits.shape()[2], rows = logits.shape()[1];
    std::vector<float> all(rows * width);
    Global("runtime.TVMTensorCopyToBytes")(logits, static_cast<void*>(all.data()), all.size() * sizeof(float));
    return {all.end() - width, all.end()};
  }

 private:
  void FindGpu() {
    if (!dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_GLOBAL)) {
      throw UserError(std::string("this artifact runs on a GPU, and TVM's library for it does not load: ") + dlerror());
    }
    device_ = {kDLCUDA, 0};
  }

  void LoadLibrary(const std::string& path) {
    ffi::Module library = ffi::Module::LoadFromFile(path);
    machine_ = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
    constexpr int kPooled = 2;
    auto start = (*machine_)->GetFunction("vm_initialization").value();
    // The host's memory is managed beside the GPU's: shapes are computed there.
    if (device_.device_type == kDLCPU) {
      start(static_cast<int>(kDLCPU), 0, kPooled);
    } else {
      start(static_cast<int>(device_.device_type), 0, kPooled, static_cast<int>(kDLCPU), 0, kPooled);
    }
    main_ = (*machine_)->GetFunction("main").value();
  }

  void LoadWeights(const WeightFiles& files, const json::Array& parameters) {
    for (const auto& entry : parameters) {
      auto parameter = entry.cast<json::Object>();
      std::string dtype = GetString(parameter, "dtype");
      std::vector<int64_t> shape = Integers(Get<json::Array>(parameter, "shape"));
      const StoredTensor& source = files.Find(GetString(parameter, "name"), shape);
      bool aligned = reinterpret_cast<uintptr_t>(source.data) % kLine == 0;
      if (device_.device_type == kDLCPU && aligned && IsOfType(source, dtype) && source.bytes != 0) {
        DLDataType type = ffi::StringToDLDataType(dtype);
        weights_.push_back(ffi::Tensor::FromNDAlloc(MappedMemory{source}, ffi::Shape(shape), type, device_));
        continue;
      }
      ffi::Tensor host = OnHost(shape, dtype);
      CopyTo(source, dtype, static_cast<char*>(host.data_ptr()), Bytes(host));
      weights_.push_back(OnDevice(host, shape, dtype));
    }
  }

  void MakeCaches(const json::Object& cache) {
    std::string rows = Has(cache, "dtype") ? GetString(cache, "dtype") : "float32";
    std::vector<int64_t> states;  // of recurrent layers, always float32
    if (Has(cache, "states")) states = Integers(Get<json::Array>(cache, "states"));
    for (const auto& extents : Get<json::Array>(cache, "tensors")) {
      std::vector<int64_t> shape = Integers(extents.cast<json::Array>());
      bool state = std::find(states.begin(), states.end(), static_cast<int64_t>(caches_.size())) != states.end();
      std::string dtype = state ? "float32" : rows;
      ffi::Tensor zeros = OnHost(shape, dtype);
      std::memset(zeros.data_ptr(), 0, Bytes(zeros));
      caches_.push_back(OnDevice(zeros, shape, dtype));
    }
  }

  ffi::Tensor OnDevice(const ffi::Tensor& host, const std::vector<int64_t>& shape, const std::string& dtype) const {
    if (device_.device_type == kDLCPU) return host;
    ffi::Tensor there = Allocate(shape, dtype);
    Global("runtime.TVMTensorCopyFromTo")(host, there);
    return there;
  }

  ffi::Tensor Allocate(const std::vector<int64_t>& shape, const std::string& dtype) const {
    auto allocate = Global("runtime.TVMTensorAllocWithScope");
    return allocate(ffi::Shape(shape), ffi::StringToDLDataType(dtype), device_, nullptr).cast<ffi::Tensor>();
  }

  ffi::Tensor Put(const std::vector<int64_t>& values) const {
    ffi::Tensor tensor = Allocate({1, static_cast<int64_t>(values.size())}, "int64");
    void* source = const_cast<int64_t*>(values.data());
    Global("runtime.TVMTensorCopyFromBytes")(tensor, source, values.size() * sizeof(int64_t));
    return tensor;
  }

  DLDevice device_{kDLCPU, 0};
  ffi::Function main_;
  ffi::Optional<ffi::Module> machine_;  // owns the memory that main_ uses
  ffi::Array<ffi::Tensor> weights_, caches_;
};

}  // namespace

std::unique_ptr<Engine> OpenLibrary(const std::filesystem::path& folder, const json::Object& manifest) {
  return std::make_unique<VirtualMachine>(folder, manifest);
}
