#include "safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

namespace {

const std::map<std::string, std::string> kNames = {
    {"F32", "float32"}, {"F16", "float16"}, {"BF16", "bfloat16"}, {"I8", "int8"},   {"U8", "uint8"},
    {"I32", "int32"},   {"I64", "int64"},   {"U32", "uint32"},    {"BOOL", "bool"},
};

float FromHalf(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  float value;
  if (exponent == 0) {  // subnormal: mantissa * 2^-24
    value = static_cast<float>(mantissa) / 16777216.0f;
    return sign ? -value : value;
  }
  uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  int file = open(path.c_str(), O_RDONLY);
  struct stat info {};
  if (file < 0 || fstat(file, &info) != 0) throw UserError(path.string() + ": cannot be read");
  size_ = static_cast<size_t>(info.st_size);
  void* mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) throw UserError(path.string() + ": cannot be mapped into memory");
  data_ = static_cast<const char*>(mapped);
}

MappedFile::~MappedFile() { munmap(const_cast<char*>(data_), size_); }

std::map<std::string, StoredTensor> ReadTensors(const std::filesystem::path& path) {
  auto file = std::make_shared<MappedFile>(path);
  uint64_t header = 0;
  if (file->size() >= 8) std::memcpy(&header, file->data(), 8);
  if (header == 0 || header > file->size() - 8) throw UserError(path.string() + ": not a safetensors file");
  json::Object entries = ParseObject(std::string(file->data() + 8, header), path.string());
  std::map<std::string, StoredTensor> tensors;
  for (const auto& [key, value] : entries) {
    std::string name(key.cast<tvm::ffi::String>());
    if (name == "__metadata__") continue;
    auto entry = value.cast<json::Object>();
    auto offsets = Get<json::Array>(entry, "data_offsets");
    auto begin = offsets[0].cast<int64_t>(), end = offsets[1].cast<int64_t>();
    if (begin < 0 || end < begin || static_cast<uint64_t>(end) > file->size() - 8 - header) {
      throw UserError(path.string() + ": " + name + " is cut off; copy the file again");
    }
    StoredTensor tensor{GetString(entry, "dtype"), {}, file->data() + 8 + header + begin,
                        static_cast<size_t>(end - begin), file};
    for (const auto& extent : Get<json::Array>(entry, "shape")) tensor.shape.push_back(extent.cast<int64_t>());
    tensors[name] = std::move(tensor);
  }
  return tensors;
}

WeightFiles::WeightFiles(const std::filesystem::path& folder, const json::Object& manifest) : folder_(folder) {
  for (const auto& [name, record] : Get<json::Object>(manifest, "files")) {
    std::string file(name.cast<tvm::ffi::String>());
    if (file.ends_with(".safetensors")) tensors_.merge(ReadTensors(folder / file));
  }
}

const StoredTensor& WeightFiles::Find(const std::string& name, const std::vector<int64_t>& shape) const {
  auto found = tensors_.find(name);
  if (found == tensors_.end() || found->second.shape != shape) {
    throw UserError(folder_.string() + ": no tensor " + name + " of the right shape; compile the model again");
  }
  return found->second;
}

bool IsOfType(const StoredTensor& tensor, const std::string& dtype) {
  auto found = kNames.find(tensor.dtype);
  return found != kNames.end() && found->second == dtype;
}

void CopyTo(const StoredTensor& tensor, const std::string& dtype, char* out, size_t bytes) {
  if (IsOfType(tensor, dtype) && tensor.bytes == bytes) {
    std::memcpy(out, tensor.data, bytes);
    return;
  }
  bool half = tensor.dtype == "F16", brain = tensor.dtype == "BF16";
  if (dtype != "float32" || !(half || brain) || tensor.bytes * 2 != bytes) {
    throw UserError("a tensor is stored as " + tensor.dtype + ", and the library wants " + dtype +
                    ": compile the model again");
  }
  for (size_t i = 0; i < tensor.bytes / 2; ++i) {
    uint16_t stored;
    std::memcpy(&stored, tensor.data + 2 * i, 2);
    uint32_t wide = static_cast<uint32_t>(stored) << 16;
    float value = half ? FromHalf(stored) : 0.0f;
    if (brain) std::memcpy(&value, &wide, 4);
    std::memcpy(out + 4 * i, &value, 4);
  }
}
