// UTF-8, and the alphabet that byte-level tokenizers write bytes in.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>

// The 256 bytes as printable characters, and back (GPT-2's table).
class ByteAlphabet {
 public:
  ByteAlphabet();
  std::string Encode(std::string_view bytes) const;
  // Bytes of a token's text; characters outside of the alphabet stay as they are.
  std::string Decode(std::string_view characters) const;

 private:
  std::array<std::string, 256> characters_;
  std::unordered_map<std::string, unsigned char> bytes_;
};

// Length of the first character of `text` in bytes; 0 where the text ends inside of it, -n where its first n
// bytes are not UTF-8.
int FirstCharacter(std::string_view text);

// Gives out whole characters of a stream of bytes; what is not UTF-8 becomes U+FFFD.
class CharacterStream {
 public:
  std::string Push(std::string_view bytes);
  std::string Flush();

 private:
  std::string pending_;
};
