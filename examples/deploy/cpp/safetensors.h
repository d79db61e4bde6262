// Tensors of safetensors files, mapped into memory.
#pragma once

#include <tvm/ffi/container/shape.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "json.h"

// A file of tensors; it stays mapped as long as this lives.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
};

struct StoredTensor {
  std::string dtype;  // safetensors' name
  std::vector<int64_t> shape;
  const char* data = nullptr;
  size_t bytes = 0;
  std::shared_ptr<MappedFile> file;
};

// The tensors of a file by name. Throws UserError for a file that is cut off or not safetensors.
std::map<std::string, StoredTensor> ReadTensors(const std::filesystem::path& path);

// All tensors of an artifact.
class WeightFiles {
 public:
  WeightFiles(const std::filesystem::path& folder, const json::Object& manifest);
  // Throws UserError where there is none of this name and shape.
  const StoredTensor& Find(const std::string& name, const std::vector<int64_t>& shape) const;

 private:
  std::filesystem::path folder_;
  std::map<std::string, StoredTensor> tensors_;
};

// The values of `tensor` as `dtype` ("float32", "int8", ...), in `out` of as many elements: a copy, or from
// bfloat16 or float16 to float32. Throws UserError where that is not exact.
void CopyTo(const StoredTensor& tensor, const std::string& dtype, char* out, size_t bytes);
// Whether the bytes in the file are those of `dtype`.
bool IsOfType(const StoredTensor& tensor, const std::string& dtype);
