// A compiled model in memory, and its sequence.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <set>
#include <vector>

#include "engine.h"
#include "json.h"

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

 private:
  void CheckFiles(const json::Object& manifest) const;
  void CheckMachine(const json::Object& target) const;

  std::filesystem::path folder_;
  std::unique_ptr<Engine> engine_;
  std::vector<float> logits_;
  std::set<int64_t> ends_;
  int64_t context_ = 0, chunk_ = 0, vocabulary_ = 0, length_ = 0;
};
