// A compiled model in memory, and its sequence.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "json.h"
#include "safetensors.h"

class Model {
 public:
  // Loads an artifact folder. Throws UserError for one that is damaged or for another machine.
  explicit Model(const std::filesystem::path& folder);

  // Appends `ids` to the sequence; the likeliest next token, the lowest of several.
  int64_t Next(const std::vector<int64_t>& ids);
  // Logits of the last call's last position.
  const std::vector<float>& logits() const { return logits_; }

  bool IsEnd(int64_t token) const { return ends_.count(token) != 0; }
  int64_t context() const { return context_; }
  int64_t length() const { return length_; }

 private:
  void CheckFiles(const json::Object& manifest) const;
  void CheckMachine(const json::Object& target);
  void LoadLibrary();
  void LoadWeights(const json::Object& manifest);
  void MakeCaches(const json::Object& cache);
  void Run(const int64_t* ids, int64_t count);
  tvm::ffi::Tensor Allocate(const std::vector<int64_t>& shape, const std::string& dtype) const;
  tvm::ffi::Tensor Put(const std::vector<int64_t>& values) const;

  std::filesystem::path folder_;
  DLDevice device_{kDLCPU, 0};
  tvm::ffi::Function main_;
  tvm::ffi::Optional<tvm::ffi::Module> machine_;  // owns the memory that main_ uses
  std::vector<std::map<std::string, StoredTensor>> files_;
  tvm::ffi::Array<tvm::ffi::Tensor> weights_, caches_;
  std::vector<float> logits_;
  std::set<int64_t> ends_;
  int64_t context_ = 0, chunk_ = 0, vocabulary_ = 0, length_ = 0;
};
