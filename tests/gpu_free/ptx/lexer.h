// Tokens of PTX text, and how its names and numbers are read. parse.cpp reads modules with it, body.cpp functions.
#ifndef PTX_LEXER_H
#define PTX_LEXER_H

#include <string>

#include "machine.h"

namespace ptx {

struct Token {
  enum Kind : uint8_t { end, name, number, string, mark } kind = end;
  std::string text;
  size_t begin = 0, finish = 0;  // in the module's text
  int line = 1;
  bool is(const char *what) const { return kind != string && text == what; }
};

// One token ahead. Names contain dots and double colons: "ld.shared::cta.b64", ".reg", "%tid.x" are single tokens.
class Lexer {
 public:
  explicit Lexer(const std::string &text, size_t position = 0, int line = 1);

  const Token &peek() const { return token_; }
  Token take();
  bool accept(const char *text);  // takes the token if it is this one
  void expect(const char *text);
  std::string name();  // takes a name
  uint64_t integer();  // takes an integer, a sign before it or not
  // Takes a number of any form: integers and the bits of floats ("1.0" as a double's).
  uint64_t number();
  void skip_line(int line);  // takes what is on the line
  void skip_braces();        // takes a { } and what is between
  [[noreturn]] void fail(const std::string &why) const;
  const std::string &text() const { return text_; }

 private:
  void advance();
  void skip_blanks();

  const std::string &text_;
  size_t position_;
  int line_;
  Token token_;
};

// Bytes of a type like ".b32"; 0 for ".pred".
size_t type_bytes(const Lexer &, const std::string &type);
inline size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// ".align 8 .b8 name[376]": what .param, .shared, .local, .global and .const have behind them.
struct Variable {
  std::string name;
  size_t bytes = 0, align = 1, element = 1;
  bool unsized = false;  // "name[]"
};
Variable read_variable(Lexer &);

// Reads the body of an entry from its "{" on.
void read_body(Lexer &, const Module &, Function &);
// Makes registers that are never needed at the same time share a slot (registers.cpp).
void share_registers(Function &);

}  // namespace ptx

#endif
