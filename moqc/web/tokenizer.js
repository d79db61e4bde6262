// Byte-level BPE, read from a tokenizer.json of Hugging Face's tokenizers.

const GPT2 = "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

// Printable characters that stand for the 256 bytes (GPT-2).
function byteCharacters() {
  const kept = new Set();
  for (const [first, last] of [[33, 126], [161, 172], [174, 255]]) {
    for (let byte = first; byte <= last; byte++) kept.add(byte);
  }
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(kept.has(byte) ? byte : next++));
}

// A pattern of Rust's or Oniguruma's syntax as one of JavaScript's.
function compilePattern(pattern) {
  const text = pattern.replaceAll("\\Z", "$").replaceAll("\\A", "^")
    .replace(/([*+?]|\{\d+,?\d*\})\+/g, "$1"); // possessive quantifiers
  try {
    return new RegExp(text, "gu");
  } catch {
    // Before modifiers: letters of a case-insensitive group in both cases.
    const both = text.replace(/\(\?i:((?:[^()]|\([^()]*\))*)\)/g, (_, inner) =>
      `(?:${inner.replace(/[a-z]/g, (letter) => `[${letter}${letter.toUpperCase()}]`)})`);
    return new RegExp(both, "gu");
  }
}

export class Tokenizer {
  static async load(path) {
    const response = await fetch(path);
    if (!response.ok) throw new Error(`${path}: ${response.status}`);
    return new Tokenizer(await response.json());
  }

  constructor(definition) {
    const { model, normalizer, pre_tokenizer: pre } = definition;
    if (model.type !== "BPE" || model.byte_fallback) throw new Error("the page has byte-level BPE only");
    const stages = pre?.type === "Sequence" ? pre.pretokenizers : [pre];
    const bytes = stages.find((stage) => stage?.type === "ByteLevel");
    if (!bytes) throw new Error("the page has byte-level BPE only");
    this.splits = stages.filter((stage) => stage.type === "Split").map((stage) => {
      if (stage.behavior !== "Isolated" || stage.invert) throw new Error(`no split of kind ${stage.behavior}`);
      return compilePattern(stage.pattern.Regex ?? RegExp.escape(stage.pattern.String));
    });
    if (stages.some((stage) => stage.type === "Digits")) this.splits.push(/\p{N}/gu);
    if (bytes.use_regex) this.splits.push(compilePattern(GPT2));
    this.prefix = bytes.add_prefix_space;
    this.normalize = ["NFC", "NFKC"].includes(normalizer?.type) ? normalizer.type : null;
    this.vocabulary = new Map(Object.entries(model.vocab));
    this.ranks = new Map(model.merges.map((pair, rank) =>
      [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    this.whole = model.ignore_merges ?? false;
    this.added = new Map((definition.added_tokens ?? []).map((token) => [token.content, token]));
    this.first = (definition.post_processor?.single ?? [])
      .filter((part, at, all) => part.SpecialToken && at < all.findIndex((each) => each.Sequence))
      .map((part) => definition.post_processor.special_tokens[part.SpecialToken.id].ids[0]);
    this.characters = byteCharacters();
    this.bytes = new Map(this.characters.map((character, byte) => [character, byte]));
    this.pieces = [];
    for (const [piece, id] of this.vocabulary) this.pieces[id] = piece;
    for (const token of this.added.values()) this.pieces[token.id] = token.content;
  }

  encode(text) {
    const ids = [...this.first];
    const escaped = [...this.added.keys()].sort((a, b) => b.length - a.length)
      .map((content) => content.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    const parts = escaped.length ? text.split(new RegExp(`(${escaped.join("|")})`)) : [text];
    for (const part of parts) {
      if (this.added.has(part)) ids.push(this.added.get(part).id);
      else if (part) ids.push(...this.encodePlain(part));
    }
    return ids;
  }

  encodePlain(text) {
    let words = [this.normalize ? text.normalize(this.normalize) : text];
    if (this.prefix && !/^\s/.test(words[0])) words[0] = ` ${words[0]}`;
    for (const pattern of this.splits) words = words.flatMap((word) => isolate(word, pattern));
    const encoder = new TextEncoder();
    return words.flatMap((word) =>
      this.merge(Array.from(encoder.encode(word), (byte) => this.characters[byte])));
  }

  // Apply merges, the lowest rank first.
  merge(parts) {
    if (this.whole && this.vocabulary.has(parts.join(""))) return [this.vocabulary.get(parts.join(""))];
    while (parts.length > 1) {
      let best = -1, lowest = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < lowest) [best, lowest] = [i, rank];
      }
      if (best < 0) break;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
    return parts.map((part) => {
      if (!this.vocabulary.has(part)) throw new Error(`no token for ${JSON.stringify(part)}`);
      return this.vocabulary.get(part);
    });
  }

  // The bytes of tokens; special ones have none.
  decodeBytes(ids) {
    const encoder = new TextEncoder();
    return Uint8Array.from(ids.flatMap((id) => {
      const piece = this.pieces[id] ?? "";
      const added = this.added.get(piece);
      if (added) return added.special ? [] : [...encoder.encode(piece)];
      return Array.from(piece, (character) => this.bytes.get(character));
    }));
  }

  decode(ids) {
    return new TextDecoder().decode(this.decodeBytes(ids));
  }

  // A function from the next token to the text that became certain with it; without one, the rest.
  stream() {
    const decoder = new TextDecoder();
    return (id) => id === undefined ? decoder.decode() : decoder.decode(this.decodeBytes([id]), { stream: true });
  }
}

// The matches of a pattern and what is between them.
function isolate(text, pattern) {
  const pieces = [];
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    if (!match[0]) continue;
    if (match.index > end) pieces.push(text.slice(end, match.index));
    pieces.push(match[0]);
    end = match.index + match[0].length;
  }
  if (end < text.length) pieces.push(text.slice(end));
  return pieces;
}
