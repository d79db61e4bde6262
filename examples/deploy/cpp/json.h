// Files of JSON, by the parser of tvm-ffi.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/extra/json.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "error.h"

namespace json = tvm::ffi::json;

inline std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw UserError(path.string() + ": cannot be read");
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

inline json::Object ParseObject(const std::string& text, const std::string& what) {
  tvm::ffi::String problem;
  json::Value value = json::Parse(text, &problem);
  std::optional<json::Object> object = value.try_cast<json::Object>();
  if (!object) throw UserError(what + ": not a JSON object " + std::string(problem));
  return *object;
}

// Whether `object` has a value under `key` that is not null.
inline bool Has(const json::Object& object, const char* key) {
  tvm::ffi::String name(key);
  return object.count(name) != 0 && object.at(name) != nullptr;
}

template <typename T>
T Get(const json::Object& object, const char* key) {
  tvm::ffi::String name(key);
  if (object.count(name) == 0) throw UserError(std::string("no '") + key + "' in a JSON object");
  return object.at(name).cast<T>();
}

inline std::string GetString(const json::Object& object, const char* key) {
  return std::string(Get<tvm::ffi::String>(object, key));
}

inline std::vector<int64_t> Integers(const json::Array& items) {
  std::vector<int64_t> found;
  for (const auto& item : items) found.push_back(item.cast<int64_t>());
  return found;
}
