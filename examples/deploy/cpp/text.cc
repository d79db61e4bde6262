#include "text.h"

namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

std::string Utf8(uint32_t code) {
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

bool Printable(int byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
}

}  // namespace

ByteAlphabet::ByteAlphabet() {
  uint32_t next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    characters_[byte] = Utf8(Printable(byte) ? byte : next++);
    bytes_[characters_[byte]] = static_cast<unsigned char>(byte);
  }
}

std::string ByteAlphabet::Encode(std::string_view bytes) const {
  std::string result;
  for (unsigned char byte : bytes) result += characters_[byte];
  return result;
}

std::string ByteAlphabet::Decode(std::string_view characters) const {
  std::string result;
  while (!characters.empty()) {
    int length = std::max(1, std::abs(FirstCharacter(characters)));
    std::string one(characters.substr(0, length));
    auto found = bytes_.find(one);
    if (found == bytes_.end()) {
      result += one;
    } else {
      result += static_cast<char>(found->second);
    }
    characters.remove_prefix(length);
  }
  return result;
}

int FirstCharacter(std::string_view text) {
  auto at = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  unsigned char first = at(0);
  if (first < 0x80) return 1;
  int length = first >= 0xC2 && first <= 0xDF ? 2 : first >= 0xE0 && first <= 0xEF ? 3 : first >= 0xF0 && first <= 0xF4 ? 4 : 0;
  if (length == 0) return -1;
  for (int i = 1; i < length; ++i) {
    if (static_cast<size_t>(i) == text.size()) return 0;
    // The second byte rules out long forms, surrogates and what is past U+10FFFF.
    unsigned char low = 0x80, high = 0xBF;
    if (i == 1 && first == 0xE0) low = 0xA0;
    if (i == 1 && first == 0xED) high = 0x9F;
    if (i == 1 && first == 0xF0) low = 0x90;
    if (i == 1 && first == 0xF4) high = 0x8F;
    if (at(i) < low || at(i) > high) return -i;
  }
  return length;
}

std::string CharacterStream::Push(std::string_view bytes) {
  pending_ += bytes;
  std::string result;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    int length = FirstCharacter(rest);
    if (length == 0) break;
    result += length > 0 ? rest.substr(0, length) : kReplacement;
    rest.remove_prefix(std::abs(length));
  }
  pending_ = std::string(rest);
  return result;
}

std::string CharacterStream::Flush() {
  std::string result(pending_.empty() ? std::string_view() : kReplacement);
  pending_.clear();
  return result;
}
