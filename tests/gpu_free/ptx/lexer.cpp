#include "lexer.h"

#include <cctype>
#include <cstdlib>

namespace ptx {
namespace {

bool starts_name(char c) { return std::isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }
bool in_name(char c) { return starts_name(c) || std::isdigit(static_cast<unsigned char>(c)); }

}  // namespace

Lexer::Lexer(const std::string &text, size_t position, int line) : text_(text), position_(position), line_(line) { advance(); }

void Lexer::fail(const std::string &why) const {
  throw Error("PTX, line " + std::to_string(token_.line) + ", at \"" + token_.text + "\": " + why);
}

void Lexer::skip_blanks() {
  for (;;) {
    if (position_ >= text_.size()) return;
    if (text_[position_] == '\n') {
      ++line_, ++position_;
    } else if (std::isspace(static_cast<unsigned char>(text_[position_]))) {
      ++position_;
    } else if (text_.compare(position_, 2, "//") == 0) {
      position_ = std::min(text_.find('\n', position_), text_.size());
    } else if (text_.compare(position_, 2, "/*") == 0) {
      const size_t stop = std::min(text_.find("*/", position_ + 2), text_.size());
      for (; position_ < stop; ++position_) line_ += text_[position_] == '\n';
      position_ = std::min(stop + 2, text_.size());
    } else {
      return;
    }
  }
}

void Lexer::advance() {
  skip_blanks();
  token_.begin = position_;
  token_.line = line_;
  token_.kind = Token::end;
  if (position_ < text_.size()) {
    const char first = text_[position_];
    if (starts_name(first)) {
      token_.kind = Token::name;
      // A single colon ends a label.
      for (;; ++position_) {
        if (text_.compare(position_, 2, "::") == 0)
          ++position_;
        else if (position_ >= text_.size() || !in_name(text_[position_]))
          break;
      }
    } else if (std::isdigit(static_cast<unsigned char>(first))) {
      token_.kind = Token::number;
      const bool bits = first == '0' && position_ + 1 < text_.size() && std::strchr("xXfFdD", text_[position_ + 1]) != nullptr;
      for (++position_; position_ < text_.size(); ++position_) {
        const char c = text_[position_], before = text_[position_ - 1];
        const bool exponent = !bits && (c == '+' || c == '-') && (before == 'e' || before == 'E');
        if (!exponent && c != '.' && !std::isalnum(static_cast<unsigned char>(c))) break;
      }
    } else if (first == '"') {
      token_.kind = Token::string;
      position_ = text_.find('"', position_ + 1);
      if (position_ == std::string::npos) fail("a string does not end");
      ++position_;
    } else {
      token_.kind = Token::mark;
      ++position_;
    }
  }
  token_.finish = position_;
  token_.text.assign(text_, token_.begin, token_.finish - token_.begin);
}

Token Lexer::take() {
  Token taken = token_;
  advance();
  return taken;
}

bool Lexer::accept(const char *text) {
  const bool same = token_.is(text);
  if (same) advance();
  return same;
}

void Lexer::expect(const char *text) {
  if (!accept(text)) fail(std::string("expected \"") + text + "\"");
}

std::string Lexer::name() {
  if (token_.kind != Token::name) fail("expected a name");
  return take().text;
}

uint64_t Lexer::integer() {
  const std::string &text = token_.text;
  if (text.find('.') != std::string::npos || text.compare(0, 2, "0f") == 0 || text.compare(0, 2, "0d") == 0)
    fail("expected an integer");
  return number();
}

uint64_t Lexer::number() {
  const bool negative = accept("-");
  if (!negative) accept("+");
  if (token_.kind != Token::number) fail("expected a number");
  std::string text = token_.text;
  const char second = text.size() > 1 && text[0] == '0' ? static_cast<char>(std::tolower(text[1])) : '\0';
  uint64_t bits = 0;
  char *end = nullptr;
  if (second == 'f' || second == 'd') {
    const size_t digits = second == 'f' ? 8 : 16;
    if (text.size() != digits + 2) fail("a float of the wrong length");
    bits = std::strtoull(text.c_str() + 2, &end, 16);
    if (negative) bits ^= uint64_t{1} << (4 * digits - 1);
  } else if (second != 'x' && second != 'b' && text.find_first_of(".eE") != std::string::npos) {
    const double value = negative ? -std::strtod(text.c_str(), &end) : std::strtod(text.c_str(), &end);
    std::memcpy(&bits, &value, sizeof bits);
  } else {
    if (text.back() == 'U' || text.back() == 'u') text.pop_back();
    bits = second == 'b' ? std::strtoull(text.c_str() + 2, &end, 2) : std::strtoull(text.c_str(), &end, 0);
    if (negative) bits = -bits;
  }
  if (*end != '\0') fail("not a number");
  advance();
  return bits;
}

void Lexer::skip_line(int line) {
  while (token_.kind != Token::end && token_.line == line) advance();
}

void Lexer::skip_braces() {
  expect("{");
  for (int depth = 1; depth > 0; advance()) {
    if (token_.kind == Token::end) fail("a brace is not closed");
    depth += token_.is("{") - token_.is("}");
  }
}

size_t type_bytes(const Lexer &lexer, const std::string &type) {
  if (type == ".pred") return 0;
  const size_t digits = type.find_first_of("0123456789");
  const int bits = digits == std::string::npos ? 0 : std::atoi(type.c_str() + digits);
  if (bits % 8 != 0 || bits == 0) lexer.fail("expected a type, not \"" + type + "\"");
  return static_cast<size_t>(bits / 8);
}

Variable read_variable(Lexer &lexer) {
  Variable variable;
  size_t align = 0;
  for (;;) {
    const std::string word = lexer.name();
    if (word == ".align") {
      align = lexer.integer();
    } else if (word == ".ptr") {  // ".ptr .global .align 16": of what a pointer points at
      while (lexer.peek().text[0] == '.') {
        if (lexer.name() == ".align") lexer.integer();
      }
    } else if (word == ".v2" || word == ".v4") {
      variable.element *= word == ".v2" ? 2 : 4;
    } else if (word[0] == '.') {
      variable.element *= type_bytes(lexer, word);
    } else {
      variable.name = word;
      break;
    }
  }
  variable.align = align ? align : variable.element;
  variable.bytes = variable.element;
  while (lexer.accept("[")) {
    if (lexer.accept("]")) {
      variable.unsized = true;
    } else {
      variable.bytes *= lexer.integer();
      lexer.expect("]");
    }
  }
  return variable;
}

}  // namespace ptx
