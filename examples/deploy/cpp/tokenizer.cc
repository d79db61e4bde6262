#include "tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <climits>
#include <memory>

namespace {

// What GPT-2's tokenizer splits text by, where the file does not say.
constexpr const char* kByteLevelSplit =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// Characters that normalization to NFC may change or join with their neighbours.
constexpr const char* kNotComposed =
    R"([\p{M}\x{1100}-\x{11FF}\x{1FFE}\x{2000}\x{2001}\x{2126}\x{212A}\x{212B}\x{2329}\x{232A}\x{F900}-\x{FAFF}\x{FB1D}-\x{FB4E}\x{2F800}-\x{2FA1F}])";

[[noreturn]] void Refuse(const std::string& what) {
  throw UserError("tokenizer.json: " + what + " is not known to this program: give token ids with --ids");
}

using Span = std::pair<size_t, size_t>;

// The matches of `pattern` in `text`, in order.
std::vector<Span> Matches(const std::string& pattern, const std::string& text) {
  int code = 0;
  PCRE2_SIZE where = 0;
  auto bytes = [](const std::string& s) { return reinterpret_cast<PCRE2_SPTR>(s.data()); };
  std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> compiled(
      pcre2_compile(bytes(pattern), pattern.size(), PCRE2_UTF | PCRE2_UCP, &code, &where, nullptr), pcre2_code_free);
  if (!compiled) Refuse("the pattern " + pattern);
  std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(compiled.get(), nullptr), pcre2_match_data_free);
  std::vector<Span> spans;
  for (size_t start = 0; start < text.size();) {
    int count = pcre2_match(compiled.get(), bytes(text), text.size(), start, 0, match.get(), nullptr);
    if (count == PCRE2_ERROR_NOMATCH) break;
    if (count < 0) throw UserError("the prompt is not UTF-8, or too long");
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(match.get());
    if (bounds[1] > bounds[0]) spans.emplace_back(bounds[0], bounds[1]);
    start = std::max<size_t>(bounds[1], start + 1);
  }
  return spans;
}

// Pieces of `text`: the matches and what is between them.
std::vector<std::string> Split(const std::string& pattern, const std::string& text) {
  std::vector<std::string> pieces;
  size_t done = 0;
  for (auto [begin, end] : Matches(pattern, text)) {
    if (begin > done) pieces.push_back(text.substr(done, begin - done));
    pieces.push_back(text.substr(begin, end - begin));
    done = end;
  }
  if (done < text.size()) pieces.push_back(text.substr(done));
  return pieces;
}

bool IsTrue(const json::Object& object, const char* key) { return Has(object, key) && Get<bool>(object, key); }

std::string MergeKey(std::string_view left, std::string_view right) {
  return std::string(left) + ' ' + std::string(right);
}

}  // namespace

Tokenizer::Tokenizer(const std::filesystem::path& path) {
  json::Object file = ParseObject(ReadFile(path), path.string());
  if (Has(file, "normalizer")) {
    std::string type = GetString(Get<json::Object>(file, "normalizer"), "type");
    if (type != "NFC") Refuse("the normalizer " + type);
    composed_ = true;
  }
  ReadModel(Get<json::Object>(file, "model"));
  ReadAdded(Get<json::Array>(file, "added_tokens"));
  if (!Has(file, "pre_tokenizer")) Refuse("a tokenizer without a pre-tokenizer");
  ReadSplits(Get<json::Object>(file, "pre_tokenizer"));
  if (Has(file, "post_processor")) ReadTemplate(Get<json::Object>(file, "post_processor"));
}

void Tokenizer::ReadModel(const json::Object& model) {
  if (GetString(model, "type") != "BPE") Refuse("the model " + GetString(model, "type"));
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (Has(model, key) && !GetString(model, key).empty()) Refuse(key);
  }
  if (IsTrue(model, "byte_fallback")) Refuse("byte_fallback");
  whole_words_ = IsTrue(model, "ignore_merges");
  for (const auto& [token, id] : Get<json::Object>(model, "vocab")) {
    std::string text(token.cast<tvm::ffi::String>());
    ids_[text] = id.cast<int64_t>();
    tokens_[id.cast<int64_t>()] = text;
  }
  int rank = 0;
  for (const auto& merge : Get<json::Array>(model, "merges")) {
    if (auto text = merge.try_cast<tvm::ffi::String>()) {  // the older form is one string
      ranks_.emplace(std::string(*text), rank++);
      continue;
    }
    auto pair = merge.cast<json::Array>();
    auto part = [&](int i) { return std::string(pair[i].cast<tvm::ffi::String>()); };
    ranks_.emplace(MergeKey(part(0), part(1)), rank++);
  }
}

void Tokenizer::ReadAdded(const json::Array& added) {
  for (const auto& entry : added) {
    auto token = entry.cast<json::Object>();
    for (const char* key : {"lstrip", "rstrip", "single_word"}) {
      if (IsTrue(token, key)) Refuse(std::string("an added token with ") + key);
    }
    int64_t id = Get<int64_t>(token, "id");
    tokens_[id] = GetString(token, "content");
    added_[tokens_[id]] = id;
    (IsTrue(token, "special") ? special_ : literal_).insert(id);
  }
}

void Tokenizer::ReadSplits(const json::Object& pre_tokenizer) {
  std::string type = GetString(pre_tokenizer, "type");
  if (type == "Sequence") {
    for (const auto& part : Get<json::Array>(pre_tokenizer, "pretokenizers")) ReadSplits(part.cast<json::Object>());
  } else if (type == "Split" && Has(Get<json::Object>(pre_tokenizer, "pattern"), "Regex")) {
    if (GetString(pre_tokenizer, "behavior") != "Isolated" || IsTrue(pre_tokenizer, "invert")) Refuse("this Split");
    patterns_.push_back(GetString(Get<json::Object>(pre_tokenizer, "pattern"), "Regex"));
  } else if (type == "Digits") {
    patterns_.push_back(IsTrue(pre_tokenizer, "individual_digits") ? R"(\p{N})" : R"(\p{N}+)");
  } else if (type == "ByteLevel") {
    prefix_space_ = IsTrue(pre_tokenizer, "add_prefix_space");
    if (!Has(pre_tokenizer, "use_regex") || Get<bool>(pre_tokenizer, "use_regex")) patterns_.push_back(kByteLevelSplit);
  } else {
    Refuse("the pre-tokenizer " + type);
  }
}

void Tokenizer::ReadTemplate(const json::Object& processor) {
  std::string type = GetString(processor, "type");
  if (type == "ByteLevel") return;
  if (type == "Sequence") {
    for (const auto& part : Get<json::Array>(processor, "processors")) ReadTemplate(part.cast<json::Object>());
    return;
  }
  if (type != "TemplateProcessing") Refuse("the post-processor " + type);
  auto known = Get<json::Object>(processor, "special_tokens");
  std::vector<int64_t>* place = &before_;
  for (const auto& part : Get<json::Array>(processor, "single")) {
    auto piece = part.cast<json::Object>();
    if (Has(piece, "Sequence")) {
      place = &after_;
      continue;
    }
    std::string name = GetString(Get<json::Object>(piece, "SpecialToken"), "id");
    for (const auto& id : Get<json::Array>(Get<json::Object>(known, name.c_str()), "ids")) {
      place->push_back(id.cast<int64_t>());
    }
  }
}

std::vector<int64_t> Tokenizer::Encode(const std::string& text) const {
  if (composed_ && !Matches(kNotComposed, text).empty()) {
    throw UserError("the prompt has characters that NFC may change, which this program does not do: use --ids");
  }
  std::vector<int64_t> ids = before_;
  std::string plain;
  for (size_t at = 0; at < text.size();) {
    const std::pair<const std::string, int64_t>* longest = nullptr;
    for (const auto& token : added_) {
      bool here = !token.first.empty() && text.compare(at, token.first.size(), token.first) == 0;
      if (here && (!longest || token.first.size() > longest->first.size())) longest = &token;
    }
    if (!longest) {
      plain += text[at++];
      continue;
    }
    EncodePlain(plain, &ids);
    plain.clear();
    ids.push_back(longest->second);
    at += longest->first.size();
  }
  EncodePlain(plain, &ids);
  ids.insert(ids.end(), after_.begin(), after_.end());
  return ids;
}

void Tokenizer::EncodePlain(const std::string& text, std::vector<int64_t>* ids) const {
  if (text.empty()) return;
  std::vector<std::string> pieces{prefix_space_ && text[0] != ' ' ? ' ' + text : text};
  for (const std::string& pattern : patterns_) {
    std::vector<std::string> finer;
    for (const std::string& piece : pieces) {
      for (std::string& part : Split(pattern, piece)) finer.push_back(std::move(part));
    }
    pieces = std::move(finer);
  }
  for (const std::string& piece : pieces) EncodeWord(alphabet_.Encode(piece), ids);
}

void Tokenizer::EncodeWord(const std::string& word, std::vector<int64_t>* ids) const {
  if (whole_words_ && ids_.count(word)) {
    ids->push_back(ids_.at(word));
    return;
  }
  std::vector<std::string> parts;
  for (std::string_view rest = word; !rest.empty();) {
    int length = FirstCharacter(rest);
    parts.emplace_back(rest.substr(0, length));
    rest.remove_prefix(length);
  }
  while (parts.size() > 1) {
    int best = INT_MAX;
    size_t where = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      auto found = ranks_.find(MergeKey(parts[i], parts[i + 1]));
      if (found != ranks_.end() && found->second < best) best = found->second, where = i;
    }
    if (best == INT_MAX) break;
    parts[where] += parts[where + 1];
    parts.erase(parts.begin() + where + 1);
  }
  for (const std::string& part : parts) ids->push_back(Id(part));
}

int64_t Tokenizer::Id(const std::string& token) const {
  auto found = ids_.find(token);
  if (found == ids_.end()) Refuse("a character without a token");
  return found->second;
}

std::string Tokenizer::Bytes(int64_t id) const {
  auto found = tokens_.find(id);
  if (found == tokens_.end() || special_.count(id)) return "";
  return literal_.count(id) ? found->second : alphabet_.Decode(found->second);
}
