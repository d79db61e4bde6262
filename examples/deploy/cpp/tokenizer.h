// Byte-level BPE tokenizers as a `tokenizer.json` describes them (GPT-2, Llama 3, Qwen, OLMoE and others).
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "json.h"
#include "text.h"

class Tokenizer {
 public:
  // Throws UserError for a tokenizer of another kind, naming the part that is not known.
  explicit Tokenizer(const std::filesystem::path& path);

  // Ids of UTF-8 text, with what the tokenizer's template puts around it.
  std::vector<int64_t> Encode(const std::string& text) const;
  // The bytes that token `id` stands for; none for special tokens.
  std::string Bytes(int64_t id) const;

 private:
  void ReadModel(const json::Object& model);
  void ReadAdded(const json::Array& added);
  void ReadSplits(const json::Object& pre_tokenizer);
  void ReadTemplate(const json::Object& processor);
  void EncodePlain(const std::string& text, std::vector<int64_t>* ids) const;
  void EncodeWord(const std::string& word, std::vector<int64_t>* ids) const;
  int64_t Id(const std::string& token) const;

  ByteAlphabet alphabet_;
  std::unordered_map<std::string, int64_t> ids_;
  std::unordered_map<int64_t, std::string> tokens_;
  std::unordered_map<std::string, int> ranks_;  // "left right" -> order of the merge
  std::unordered_map<std::string, int64_t> added_;
  std::unordered_set<int64_t> special_, literal_;
  std::vector<std::string> patterns_;  // splits, applied one after the other
  std::vector<int64_t> before_, after_;
  bool prefix_space_ = false, whole_words_ = false, composed_ = false;
};
