// Modules: which kernels and variables a text has. Of a kernel only its place is kept until it is wanted.
#include <algorithm>

#include "lexer.h"

namespace ptx {
namespace {

// The values behind the "=" of a variable, into its bytes. Inner braces must be full.
void read_values(Lexer &lexer, const Module &module, const Variable &variable, unsigned char *bytes) {
  const size_t size = variable.element;
  size_t filled = 0;
  const bool list = lexer.peek().is("{");
  int depth = 0;
  do {
    while (lexer.accept("{")) ++depth;
    if (lexer.accept("}")) {
      --depth;
      continue;
    }
    uint64_t value = 0;
    if (lexer.peek().kind == Token::name) {
      const bool generic = lexer.accept("generic");
      if (generic) lexer.expect("(");
      const auto symbol = module.globals.find(lexer.name());
      if (symbol == module.globals.end()) lexer.fail("the initial value before this is no variable of global memory");
      value = symbol->second;
      if (generic) lexer.expect(")");
      if (lexer.accept("+")) value += lexer.integer();
    } else {
      value = lexer.number();
    }
    if (filled + size > variable.bytes || size > sizeof value) lexer.fail("more initial values than the variable has");
    std::memcpy(bytes + filled, &value, size);
    filled += size;
    while (depth > 0 && lexer.accept("}")) --depth;
    if (list && depth > 0) lexer.expect(",");
  } while (depth > 0);
}

void read_global(Lexer &lexer, Module &module) {
  const Variable variable = read_variable(lexer);
  if (lexer.peek().is("=") || !variable.unsized) {
    // Storage of 64-bit words; what needs more alignment than 8 bytes starts later in it.
    const size_t align = std::max<size_t>(variable.align, 8);
    module.memory.emplace_back((variable.bytes + align) / 8 + 1);
    const auto base = reinterpret_cast<uintptr_t>(module.memory.back().data());
    const uint64_t address = round_up(base, align);
    if (lexer.accept("=")) read_values(lexer, module, variable, reinterpret_cast<unsigned char *>(address));
    module.globals[variable.name] = address;
    module.variables.push_back({address, address + variable.bytes});
  }
  lexer.expect(";");
}

// From behind ".func" or an entry's name to behind its body or ";".
void skip_function(Lexer &lexer) {
  while (!lexer.peek().is("{") && !lexer.peek().is(";")) {
    if (lexer.peek().kind == Token::end) lexer.fail("a function does not end");
    lexer.take();
  }
  if (!lexer.accept(";")) lexer.skip_braces();
}

int line_at(const std::string &text, size_t position) {
  return 1 + static_cast<int>(std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(position), '\n'));
}

Function read_function(const Module &module, size_t position) {
  Lexer lexer(module.text, position, line_at(module.text, position));
  Function function;
  function.name = lexer.name();
  if (lexer.accept("(") && !lexer.accept(")")) {
    do {
      lexer.expect(".param");
      const Variable variable = read_variable(lexer);
      const size_t offset = round_up(function.parameter_bytes, variable.align);
      function.parameters.push_back({variable.name, offset, variable.bytes, variable.align});
      function.parameter_bytes = offset + variable.bytes;
    } while (lexer.accept(","));
    lexer.expect(")");
  }
  while (!lexer.peek().is("{")) {
    const std::string directive = lexer.name();
    uint32_t values[3] = {1, 1, 1};
    if (lexer.peek().kind == Token::number) {
      int count = 0;
      do values[std::min(count++, 2)] = static_cast<uint32_t>(lexer.integer());
      while (lexer.accept(","));
    }
    if (directive == ".reqntid") std::copy(values, values + 3, function.required);
    if (directive == ".reqntid" || directive == ".maxntid")
      function.max_threads = static_cast<int>(values[0] * values[1] * values[2]);
  }
  read_body(lexer, module, function);
  return function;
}

}  // namespace

Module::Module(std::string whole) : text(std::move(whole)) {
  Lexer lexer(text);
  while (lexer.peek().kind != Token::end) {
    const Token word = lexer.take();
    if (word.is(".target")) {
      target = lexer.name();
      lexer.skip_line(word.line);
    } else if (word.is(".version") || word.is(".address_size") || word.is(".file") || word.is(".loc")) {
      lexer.skip_line(word.line);
    } else if (word.is(".section")) {
      lexer.name();
      lexer.skip_braces();
    } else if (word.is(".entry")) {
      where[lexer.peek().text] = lexer.peek().begin;
      skip_function(lexer);
    } else if (word.is(".func")) {
      skip_function(lexer);
    } else if (word.is(".global") || word.is(".const")) {
      read_global(lexer, *this);
    } else if (word.is(".shared")) {
      const Variable variable = read_variable(lexer);
      shared[variable.name] = {variable.bytes, variable.align, variable.unsized};
      lexer.expect(";");
    } else if (word.is(".pragma") || word.is(".alias")) {
      while (!lexer.accept(";")) lexer.take();
    } else if (!word.is(".visible") && !word.is(".extern") && !word.is(".weak") && !word.is(".common") && !word.is(";")) {
      lexer.fail("nothing that a module has can start with \"" + word.text + "\"");
    }
  }
}

const Function &Module::function(const std::string &name) {
  const auto known = functions.find(name);
  if (known != functions.end()) return known->second;
  const auto start = where.find(name);
  if (start == where.end()) throw Error("the module has no kernel " + name);
  return functions.emplace(name, read_function(*this, start->second)).first->second;
}

}  // namespace ptx
