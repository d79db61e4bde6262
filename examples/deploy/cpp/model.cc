#include "model.h"

#include <dlfcn.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/dtype.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

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

// The CPU flags of this machine, by their Linux names.
std::set<std::string> HostFeatures() {
  std::set<std::string> found;
#if defined(__aarch64__)
  unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  const std::map<std::string, int> flags = {{"asimd", 1}, {"asimdhp", 10}, {"asimddp", 20}, {"sve", 22}};
  for (const auto& [name, bit] : flags) {
    if (first >> bit & 1) found.insert(name);
  }
  if (second >> 13 & 1) found.insert("i8mm");
#else
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    for (std::string word; words >> word;) found.insert(word);
    break;
  }
#endif
  return found;
}

std::vector<int64_t> Shape(const json::Array& extents) {
  std::vector<int64_t> shape;
  for (const auto& extent : extents) shape.push_back(extent.cast<int64_t>());
  return shape;
}

size_t Bytes(const ffi::Tensor& tensor) { return ffi::GetDataSize(tensor.numel(), tensor.dtype()); }

ffi::Function Global(const char* name) {
  std::optional<ffi::Function> found = ffi::Function::GetGlobal(name);
  if (!found) throw UserError(std::string("TVM's runtime has no function ") + name);
  return *found;
}

}  // namespace

Model::Model(const std::filesystem::path& folder) : folder_(folder) {
  std::filesystem::path path = folder / "moqc.json";
  json::Object manifest = ParseObject(ReadFile(path), path.string());
  if (Get<int64_t>(manifest, "schema_version") != 1) throw UserError(path.string() + ": of another version of moqc");
  if (Has(manifest, "graph")) throw UserError(path.string() + ": a compiled graph, not a language model");
  CheckFiles(manifest);
  CheckMachine(Get<json::Object>(manifest, "target"));
  LoadLibrary();
  LoadWeights(manifest);
  MakeCaches(Get<json::Object>(manifest, "cache"));
  vocabulary_ = Get<int64_t>(manifest, "vocabulary");
  for (int64_t id : Shape(Get<json::Array>(Get<json::Object>(manifest, "generation"), "eos_token_ids"))) ends_.insert(id);
}

void Model::CheckFiles(const json::Object& manifest) const {
  for (const auto& [name, record] : Get<json::Object>(manifest, "files")) {
    std::filesystem::path path = folder_ / std::string(name.cast<ffi::String>());
    std::error_code problem;
    auto size = std::filesystem::file_size(path, problem);
    if (problem || static_cast<int64_t>(size) != Get<int64_t>(record.cast<json::Object>(), "bytes")) {
      throw UserError(path.string() + ": missing, or not of the size in moqc.json: copy the artifact again");
    }
  }
}

void Model::CheckMachine(const json::Object& target) {
  std::set<std::string> host = HostFeatures();
  for (const auto& feature : Get<json::Array>(target, "features")) {
    std::string name(feature.cast<ffi::String>());
    if (!host.count(name)) {
      throw UserError(folder_.string() + ": compiled for " + GetString(target, "name") + ", but this CPU lacks " + name);
    }
  }
  if (Get<json::Array>(target, "architectures").empty()) return;
  if (!dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_GLOBAL)) {
    throw UserError(std::string("this artifact runs on a GPU, and TVM's library for it does not load: ") + dlerror());
  }
  device_ = {kDLCUDA, 0};
}

void Model::LoadLibrary() {
  std::string path = std::filesystem::absolute(folder_ / "model.so").string();
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

void Model::LoadWeights(const json::Object& manifest) {
  std::map<std::string, const StoredTensor*> stored;
  for (const auto& [name, record] : Get<json::Object>(manifest, "files")) {
    std::string file(name.cast<ffi::String>());
    if (!file.ends_with(".safetensors")) continue;
    files_.push_back(ReadTensors(folder_ / file));
  }
  for (const auto& file : files_) {
    for (const auto& [name, tensor] : file) stored[name] = &tensor;
  }
  for (const auto& entry : Get<json::Array>(manifest, "parameters")) {
    auto parameter = entry.cast<json::Object>();
    std::string name = GetString(parameter, "name"), dtype = GetString(parameter, "dtype");
    std::vector<int64_t> shape = Shape(Get<json::Array>(parameter, "shape"));
    auto found = stored.find(name);
    if (found == stored.end() || found->second->shape != shape) {
      throw UserError(folder_.string() + ": no tensor " + name + " of the right shape; compile the model again");
    }
    const StoredTensor& source = *found->second;
    bool aligned = reinterpret_cast<uintptr_t>(source.data) % kLine == 0;
    if (device_.device_type == kDLCPU && aligned && IsOfType(source, dtype) && source.bytes != 0) {
      DLDataType type = ffi::StringToDLDataType(dtype);
      weights_.push_back(ffi::Tensor::FromNDAlloc(MappedMemory{source}, ffi::Shape(shape), type, device_));
      continue;
    }
    ffi::Tensor host =
        ffi::Tensor::FromNDAlloc(HostMemory(), ffi::Shape(shape), ffi::StringToDLDataType(dtype), {kDLCPU, 0});
    CopyTo(source, dtype, static_cast<char*>(host.data_ptr()), Bytes(host));
    if (device_.device_type == kDLCPU) {
      weights_.push_back(host);
      continue;
    }
    ffi::Tensor there = Allocate(shape, dtype);
    Global("runtime.TVMTensorCopyFromTo")(host, there);
    weights_.push_back(there);
  }
}

void Model::MakeCaches(const json::Object& cache) {
  context_ = Get<int64_t>(cache, "context");
  chunk_ = Get<int64_t>(cache, "chunk");
  std::string dtype = Has(cache, "dtype") ? GetString(cache, "dtype") : "float32";
  for (const auto& extents : Get<json::Array>(cache, "tensors")) {
    std::vector<int64_t> shape = Shape(extents.cast<json::Array>());
    ffi::Tensor zeros =
        ffi::Tensor::FromNDAlloc(HostMemory(), ffi::Shape(shape), ffi::StringToDLDataType(dtype), {kDLCPU, 0});
    std::memset(zeros.data_ptr(), 0, Bytes(zeros));
    if (device_.device_type != kDLCPU) {
      ffi::Tensor there = Allocate(shape, dtype);
      Global("runtime.TVMTensorCopyFromTo")(zeros, there);
      zeros = there;
    }
    caches_.push_back(zeros);
  }
}

ffi::Tensor Model::Allocate(const std::vector<int64_t>& shape, const std::string& dtype) const {
  auto allocate = Global("runtime.TVMTensorAllocWithScope");
  return allocate(ffi::Shape(shape), ffi::StringToDLDataType(dtype), device_, nullptr).cast<ffi::Tensor>();
}

ffi::Tensor Model::Put(const std::vector<int64_t>& values) const {
  ffi::Tensor tensor = Allocate({1, static_cast<int64_t>(values.size())}, "int64");
  Global("runtime.TVMTensorCopyFromBytes")(tensor, static_cast<void*>(const_cast<int64_t*>(values.data())), values.size() * 8);
  return tensor;
}

int64_t Model::Next(const std::vector<int64_t>& ids) {
  if (length_ + static_cast<int64_t>(ids.size()) > context_) {
    throw UserError("more tokens than the artifact's context of " + std::to_string(context_));
  }
  for (int64_t id : ids) {
    if (id < 0 || id >= vocabulary_) throw UserError("token ids are 0.." + std::to_string(vocabulary_ - 1));
  }
  for (size_t at = 0; at < ids.size(); at += chunk_) {
    Run(ids.data() + at, std::min<int64_t>(chunk_, ids.size() - at));
  }
  return std::max_element(logits_.begin(), logits_.end()) - logits_.begin();
}

void Model::Run(const int64_t* ids, int64_t count) {
  std::vector<int64_t> tokens(ids, ids + count), positions;
  for (int64_t i = 0; i < count; ++i) positions.push_back(length_ + i);
  ffi::Any result = main_(Put(tokens), Put(positions), weights_, caches_);
  ffi::Tensor logits = result.cast<ffi::Array<ffi::Any>>()[0].cast<ffi::Tensor>();
  // [1, count, vocabulary], or the last position only.
  int64_t width = logits.shape()[2], rows = logits.shape()[1];
  std::vector<float> all(rows * width);
  Global("runtime.TVMTensorCopyToBytes")(logits, static_cast<void*>(all.data()), all.size() * 4);
  logits_.assign(all.end() - width, all.end());
  length_ += count;
}
