// Runs a compiled model: the greedy continuation of a prompt, as it comes. No Python, no compiler.
#include <charconv>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <optional>
#include <sstream>

#include "model.h"
#include "tokenizer.h"

namespace {

constexpr const char* kUsage =
    "usage: moqc-run ARTIFACT (--prompt TEXT | --ids N,N,...) [--max-tokens N] [--logits FILE]\n"
    "  --ids     token ids instead of text; the answer is token ids too\n"
    "  --logits  write the float32 logits after each token to FILE\n";

struct Options {
  std::string artifact, logits;
  std::optional<std::string> prompt, ids;
  int64_t max_tokens = 64;
};

int64_t Number(const std::string& text) {
  int64_t value = 0;
  auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc() || end != text.data() + text.size()) throw UserError(text + ": not a whole number");
  return value;
}

Options Parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    if (word == "--help" || word == "-h") {
      std::cout << kUsage;
      std::exit(0);
    }
    if (word.rfind("--", 0) != 0) {
      if (!options.artifact.empty()) throw UserError(word + ": one artifact only");
      options.artifact = word;
      continue;
    }
    if (i + 1 == count) throw UserError(word + ": needs a value");
    std::string value = words[++i];
    if (word == "--prompt") {
      options.prompt = value;
    } else if (word == "--ids") {
      options.ids = value;
    } else if (word == "--max-tokens") {
      options.max_tokens = Number(value);
    } else if (word == "--logits") {
      options.logits = value;
    } else {
      throw UserError(word + ": unknown option\n" + kUsage);
    }
  }
  if (options.artifact.empty() || options.prompt.has_value() == options.ids.has_value()) throw UserError(kUsage);
  if (options.max_tokens < 1) throw UserError("--max-tokens: at least 1");
  return options;
}

std::vector<int64_t> Numbers(const std::string& text) {
  std::vector<int64_t> ids;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) ids.push_back(Number(part));
  return ids;
}

void Write(const std::string& text) {
  std::cout << text << std::flush;
}

int Run(const Options& options) {
  Model model(options.artifact);
  std::optional<Tokenizer> tokenizer;
  if (options.prompt) tokenizer.emplace(std::filesystem::path(options.artifact) / "tokenizer.json");
  std::vector<int64_t> pending = options.prompt ? tokenizer->Encode(*options.prompt) : Numbers(*options.ids);
  if (pending.empty()) throw UserError("the prompt is empty: give at least one token to continue");
  if (static_cast<int64_t>(pending.size()) + options.max_tokens > model.context()) {
    throw UserError("prompt and answer do not fit the artifact's context of " + std::to_string(model.context()));
  }
  std::ofstream logits;
  if (!options.logits.empty()) {
    logits.open(options.logits, std::ios::binary);
    if (!logits) throw UserError(options.logits + ": cannot be written");
  }
  CharacterStream characters;
  for (int64_t step = 0; step < options.max_tokens; ++step) {
    int64_t token = model.Next(pending);
    if (logits.is_open()) {
      logits.write(reinterpret_cast<const char*>(model.logits().data()), model.logits().size() * sizeof(float));
    }
    if (model.IsEnd(token)) break;
    Write(tokenizer ? characters.Push(tokenizer->Bytes(token)) : (step ? "," : "") + std::to_string(token));
    pending = {token};
  }
  Write(characters.Flush() + "\n");
  return 0;
}

}  // namespace

int main(int count, char** words) {
  try {
    return Run(Parse(count, words));
  } catch (const UserError& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
