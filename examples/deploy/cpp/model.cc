#include "model.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>

namespace ffi = tvm::ffi;

namespace {

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

}  // namespace

Model::Model(const std::filesystem::path& folder) : folder_(folder) {
  std::filesystem::path path = folder / "moqc.json";
  json::Object manifest = ParseObject(ReadFile(path), path.string());
  if (Get<int64_t>(manifest, "schema_version") != 1) throw UserError(path.string() + ": of another version of moqc");
  if (Has(manifest, "graph")) throw UserError(path.string() + ": a compiled graph, not a language model");
  CheckFiles(manifest);
  CheckMachine(Get<json::Object>(manifest, "target"));
  auto cache = Get<json::Object>(manifest, "cache"), generation = Get<json::Object>(manifest, "generation");
  context_ = Get<int64_t>(cache, "context");
  chunk_ = Get<int64_t>(cache, "chunk");
  vocabulary_ = Get<int64_t>(manifest, "vocabulary");
  for (int64_t id : Integers(Get<json::Array>(generation, "eos_token_ids"))) ends_.insert(id);
  bool launched = Has(Get<json::Object>(manifest, "files"), "launches.json");
  engine_ = launched ? OpenLaunches(folder, manifest) : OpenLibrary(folder, manifest);
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

void Model::CheckMachine(const json::Object& target) const {
  std::set<std::string> host = HostFeatures();
  for (const auto& feature : Get<json::Array>(target, "features")) {
    std::string name(feature.cast<ffi::String>());
    if (!host.count(name)) {
      throw UserError(folder_.string() + ": compiled for " + GetString(target, "name") + ", but this CPU lacks " + name);
    }
  }
}

int64_t Model::Next(const std::vector<int64_t>& ids) {
  int64_t count = ids.size();
  if (length_ + count > context_) {
    throw UserError("more tokens than the artifact's context of " + std::to_string(context_));
  }
  for (int64_t id : ids) {
    if (id < 0 || id >= vocabulary_) throw UserError("token ids are 0.." + std::to_string(vocabulary_ - 1));
  }
  for (int64_t at = 0; at < count; at += chunk_) {
    std::vector<int64_t> chunk(ids.begin() + at, ids.begin() + std::min(at + chunk_, count));
    logits_ = engine_->Run(chunk, length_);
    length_ += chunk.size();
  }
  return std::max_element(logits_.begin(), logits_.end()) - logits_.begin();
}
