// The body of a kernel: registers and variables of nested scopes, labels, and the decoded instructions.
#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "lexer.h"

namespace ptx {
namespace {

// What a name stands for in a scope.
struct Symbol {
  enum Kind : uint8_t { reg, label, targets, variable } kind = reg;
  int slot = 0;    // of a register or the first of a family; of a label: the instruction
  int count = -1;  // of a family "%r<8>"
  uint8_t width = 0;
  uint64_t address = 0;
  std::vector<std::string> labels;  // .branchtargets
};

struct Scope {
  int parent;
  std::unordered_map<std::string, Symbol> names;
};

const std::unordered_map<std::string, int> &special_names() {
  static const std::unordered_map<std::string, int> names = {{"%tid.x", tid_x},
                                                             {"%tid.y", tid_y},
                                                             {"%tid.z", tid_z},
                                                             {"%ntid.x", ntid_x},
                                                             {"%ntid.y", ntid_y},
                                                             {"%ntid.z", ntid_z},
                                                             {"%ctaid.x", ctaid_x},
                                                             {"%ctaid.y", ctaid_y},
                                                             {"%ctaid.z", ctaid_z},
                                                             {"%nctaid.x", nctaid_x},
                                                             {"%nctaid.y", nctaid_y},
                                                             {"%nctaid.z", nctaid_z},
                                                             {"%laneid", laneid},
                                                             {"%warpid", warpid},
                                                             {"%nwarpid", nwarpid},
                                                             {"%smid", smid},
                                                             {"%nsmid", nsmid},
                                                             {"%gridid", gridid},
                                                             {"%clock", clock},
                                                             {"%clock64", clock},
                                                             {"%globaltimer", globaltimer},
                                                             {"%lanemask_lt", lanemask_lt},
                                                             {"%lanemask_le", lanemask_le},
                                                             {"%lanemask_gt", lanemask_gt},
                                                             {"%lanemask_ge", lanemask_ge},
                                                             {"%lanemask_eq", lanemask_eq},
                                                             {"%dynamic_smem_size", dynamic_smem_size},
                                                             {"%total_smem_size", total_smem_size},
                                                             {"%envreg1", envreg1},
                                                             {"%envreg2", envreg2},
                                                             // Each cluster is one block.
                                                             {"%clusterid.x", ctaid_x},
                                                             {"%clusterid.y", ctaid_y},
                                                             {"%clusterid.z", ctaid_z},
                                                             {"%nclusterid.x", nctaid_x},
                                                             {"%nclusterid.y", nctaid_y},
                                                             {"%nclusterid.z", nctaid_z},
                                                             {"%cluster_ctarank", cluster_rank},
                                                             {"%cluster_nctarank", cluster_blocks},
                                                             {"%cluster_ctaid.x", cluster_ctaid},
                                                             {"%cluster_ctaid.y", cluster_ctaid},
                                                             {"%cluster_ctaid.z", cluster_ctaid},
                                                             {"%cluster_nctaid.x", cluster_nctaid},
                                                             {"%cluster_nctaid.y", cluster_nctaid},
                                                             {"%cluster_nctaid.z", cluster_nctaid}};
  return names;
}

std::vector<std::string> split(const std::string &text) {
  std::vector<std::string> words;
  for (size_t begin = 0, dot = 0; dot != std::string::npos; begin = dot + 1) {
    dot = text.find('.', begin);
    words.push_back(text.substr(begin, dot == std::string::npos ? dot : dot - begin));
  }
  return words;
}

std::string one_line(const std::string &text) {
  std::string line;
  for (const char c : text) {
    const bool blank = c == ' ' || c == '\t' || c == '\n' || c == '\r';
    if (!blank)
      line += c;
    else if (!line.empty() && line.back() != ' ')
      line += ' ';
  }
  return line;
}

class Body {
 public:
  Body(Lexer &lexer, const Module &module, Function &function) : lexer_(lexer), module_(module), function_(function) {}

  void read() {
    lexer_.expect("{");
    scopes_.push_back({-1, {}});
    while (scope_ >= 0) statement();
    lay_out_shared();
    // A kernel that does not end with a `ret` returns all the same.
    Instruction ret;
    ret.words = {"ret"};
    ret.text = "ret";
    ret.line = lexer_.peek().line;
    function_.code.push_back(ret);
    scope_of_.push_back(0);
    for (size_t i = 0; i < function_.code.size(); ++i)
      for (auto &o : function_.code[i].operands) resolve(function_.code[i], o, scope_of_[i], false);
    share_registers(function_);
    for (auto &instruction : function_.code) {
      decode(instruction);
      function_.orders_blocks |= instruction.orders_blocks;
    }
  }

 private:
  void statement() {
    if (lexer_.accept("{")) {
      scopes_.push_back({scope_, {}});
      scope_ = static_cast<int>(scopes_.size()) - 1;
    } else if (lexer_.accept("}")) {
      scope_ = scopes_[static_cast<size_t>(scope_)].parent;
    } else if (lexer_.accept(";")) {
      return;
    } else if (lexer_.peek().text[0] == '.') {
      directive(lexer_.take());
    } else {
      instruction();
    }
  }

  Symbol &declare(const std::string &name) {
    const auto added = scopes_[static_cast<size_t>(scope_)].names.emplace(name, Symbol());
    if (!added.second) lexer_.fail("\"" + name + "\" is declared twice");
    return added.first->second;
  }

  void directive(const Token &word) {
    if (word.is(".loc") || word.is(".file")) {
      lexer_.skip_line(word.line);
      return;
    }
    if (word.is(".reg")) {
      read_registers();
    } else if (word.is(".local")) {
      const Variable variable = read_variable(lexer_);
      function_.local = round_up(function_.local, variable.align);
      address(variable.name, function_.local);
      function_.local += variable.bytes;
    } else if (word.is(".shared")) {
      const Variable variable = read_variable(lexer_);
      address(variable.name, add_shared(variable.bytes, variable.align));
    } else if (word.is(".branchtargets")) {
      Symbol &targets = scopes_[static_cast<size_t>(scope_)].names.at(last_label_);
      targets.kind = Symbol::targets;
      do targets.labels.push_back(lexer_.name());
      while (lexer_.accept(","));
    } else if (word.is(".pragma")) {
      lexer_.take();
    } else {
      lexer_.fail("\"" + word.text + "\" is not supported in a kernel");
    }
    lexer_.expect(";");
  }

  void read_registers() {
    const std::string type = lexer_.name();
    const size_t bytes = type_bytes(lexer_, type);
    do {
      const std::string name = lexer_.name();
      int count = -1;
      if (lexer_.accept("<")) {
        count = static_cast<int>(lexer_.integer());
        lexer_.expect(">");
      }
      Symbol &symbol = declare(count < 0 ? name : name + "<");
      symbol.slot = function_.slots;
      symbol.count = count;
      symbol.width = bytes ? static_cast<uint8_t>(8 * bytes) : 1;
      function_.slots += count < 0 ? 1 : count;
    } while (lexer_.accept(","));
  }

  void address(const std::string &name, uint64_t value) {
    Symbol &symbol = declare(name);
    symbol.kind = Symbol::variable;
    symbol.address = value;
  }

  size_t add_shared(size_t bytes, size_t align) {
    const size_t offset = round_up(function_.shared, align);
    function_.shared = offset + bytes;
    return offset;
  }

  // The module's shared variables that this kernel names: static ones first, then dynamic memory.
  void lay_out_shared() {
    for (auto &name : module_shared_) {
      const auto &variable = module_.shared.at(name.first);
      if (!variable.dynamic) name.second = add_shared(variable.bytes, variable.align);
    }
    size_t align = 1;
    for (const auto &name : module_shared_) {
      const auto &variable = module_.shared.at(name.first);
      if (variable.dynamic) align = std::max(align, variable.align);
    }
    function_.shared = round_up(function_.shared, align);
    for (auto &name : module_shared_)
      if (module_.shared.at(name.first).dynamic) name.second = function_.shared;
  }

  void instruction() {
    Instruction instruction;
    const size_t begin = lexer_.peek().begin;
    instruction.line = lexer_.peek().line;
    if (lexer_.accept("@")) {
      instruction.guard_negated = lexer_.accept("!");
      const Symbol *guard = find(lexer_.name(), scope_, &instruction.guard);
      if (guard == nullptr || guard->kind != Symbol::reg) lexer_.fail("the guard before this is not a register");
    }
    const std::string name = lexer_.name();
    if (instruction.guard < 0 && lexer_.accept(":")) {
      Symbol &label = declare(name);
      label.kind = Symbol::label;
      label.slot = static_cast<int>(function_.code.size());
      last_label_ = name;
      return;
    }
    instruction.words = split(name);
    if (instruction.words[0] == "call") lexer_.fail("functions and call are not supported");
    if (!lexer_.peek().is(";")) {
      do instruction.operands.push_back(operand());
      while (lexer_.accept(","));
    }
    instruction.text = one_line(lexer_.text().substr(begin, lexer_.peek().begin - begin));
    lexer_.expect(";");
    function_.code.push_back(std::move(instruction));
    scope_of_.push_back(scope_);
  }

  // Names are resolved once all labels are known: until then an operand of kind `nothing` has its name as text.
  Operand operand() {
    Operand o;
    const size_t begin = lexer_.peek().begin;
    if (lexer_.accept("!")) {
      o = operand();
      o.negated = true;
    } else if (lexer_.accept("{")) {
      o.kind = Operand::vector;
      do o.items.push_back(operand());
      while (lexer_.accept(","));
      lexer_.expect("}");
    } else if (lexer_.accept("[")) {
      o = base();
      o.kind = Operand::memory;
      while (lexer_.accept(",")) o.items.push_back(operand());
      lexer_.expect("]");
    } else if (lexer_.peek().kind == Token::name) {
      o.text = lexer_.take().text;
      if (module_.shared.count(o.text) && find(o.text, scope_, nullptr) == nullptr) module_shared_[o.text] = 0;
      if (lexer_.accept("+")) {
        o.bits = lexer_.integer();
      } else if (lexer_.accept("|")) {
        Operand pair;
        pair.kind = Operand::vector;
        pair.items.push_back(std::move(o));
        pair.items.push_back(operand());
        o = std::move(pair);
      } else {
        return o;
      }
    } else {
      o.kind = Operand::number;
      o.bits = lexer_.number();
    }
    if (o.kind != Operand::nothing) o.text = one_line(lexer_.text().substr(begin, last_end(begin)));
    return o;
  }

  // What is between "[" and "]" but for a vector of coordinates.
  Operand base() {
    Operand o;
    Operand inner = operand();
    if (inner.kind != Operand::number) std::swap(o.bits, inner.bits);
    while (lexer_.peek().is("+") || lexer_.peek().is("-")) {
      lexer_.accept("+");
      o.bits += lexer_.integer();
    }
    o.items.push_back(std::move(inner));
    return o;
  }

  size_t last_end(size_t begin) const {
    size_t end = lexer_.peek().begin;
    while (end > begin && std::isspace(static_cast<unsigned char>(lexer_.text()[end - 1]))) --end;
    return end - begin;
  }

  // The symbol that a name has in a scope, and the register's slot.
  const Symbol *find(const std::string &name, int scope, int *slot) const {
    size_t digits = name.size();
    while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
    const bool family = digits < name.size() && name.size() - digits < 9 && (name[digits] != '0' || digits + 1 == name.size());
    const std::string prefix = family ? name.substr(0, digits) + "<" : "";
    for (; scope >= 0; scope = scopes_[static_cast<size_t>(scope)].parent) {
      const auto &names = scopes_[static_cast<size_t>(scope)].names;
      const auto single = names.find(name);
      if (single != names.end()) {
        if (slot) *slot = single->second.slot;
        return &single->second;
      }
      if (!family) continue;
      const auto many = names.find(prefix);
      const int number = many == names.end() ? 0 : std::atoi(name.c_str() + digits);
      if (many != names.end() && number < many->second.count) {
        if (slot) *slot = many->second.slot + number;
        return &many->second;
      }
    }
    return nullptr;
  }

  [[noreturn]] void fail(const Instruction &instruction, const std::string &why) const {
    throw Error("PTX, line " + std::to_string(instruction.line) + ", \"" + instruction.text + "\": " + why);
  }

  void resolve(const Instruction &instruction, Operand &o, int scope, bool address) {
    for (auto &item : o.items) resolve(instruction, item, scope, o.kind == Operand::memory && &item == &o.items[0]);
    if (o.kind == Operand::memory && o.items[0].kind == Operand::reg) o.width = o.items[0].width;
    if (o.kind != Operand::nothing || o.text == "_") return;
    const auto special = special_names().find(o.text);
    if (special != special_names().end()) {
      o.kind = Operand::special;
      o.slot = special->second;
      return;
    }
    const Symbol *symbol = find(o.text, scope, &o.slot);
    if (symbol == nullptr) {
      o.kind = Operand::number;
      o.bits += address_of(instruction, o.text, address);
    } else if (symbol->kind == Symbol::reg) {
      o.kind = Operand::reg;
      o.width = symbol->width;
    } else if (symbol->kind == Symbol::label) {
      o.kind = Operand::label;
    } else if (symbol->kind == Symbol::variable) {
      o.kind = Operand::number;
      o.bits += symbol->address;
    } else {
      o.kind = Operand::vector;
      for (const auto &label : symbol->labels) {
        Operand item;
        item.text = label;
        resolve(instruction, item, scope, false);
        o.items.push_back(item);
      }
    }
  }

  // Of a name that no scope has. Parameters are numbers from 0 on as addresses of ld.param, otherwise in their window.
  uint64_t address_of(const Instruction &instruction, const std::string &name, bool address) const {
    for (const auto &parameter : function_.parameters)
      if (parameter.name == name) return parameter.offset + (address ? 0 : param_window);
    const auto shared = module_shared_.find(name);
    if (shared != module_shared_.end()) return shared->second;
    const auto global = module_.globals.find(name);
    if (global != module_.globals.end()) return global->second;
    if (name == "WARP_SZ") return 32;
    fail(instruction, "nothing is called \"" + name + "\"");
  }

  void decode(Instruction &instruction) const {
    static const std::unordered_set<std::string> quiet = {"add", "and", "bra",  "cvt",  "ld",  "mov", "mul", "nanosleep",
                                                          "not", "or",  "setp", "selp", "shl", "shr", "sub", "xor"};
    instruction.quiet = quiet.count(instruction.words[0]) > 0;
    try {
      if (decode_scalar(instruction) || decode_async(instruction) || decode_matrix(instruction)) return;
    } catch (const Error &error) {
      fail(instruction, error.what());
    }
    fail(instruction, "this instruction is not known");
  }

  Lexer &lexer_;
  const Module &module_;
  Function &function_;
  std::vector<Scope> scopes_;
  int scope_ = 0;
  std::vector<int> scope_of_;  // of each instruction
  std::string last_label_;
  std::map<std::string, size_t> module_shared_;  // offsets of the module's shared variables that the kernel names
};

}  // namespace

void read_body(Lexer &lexer, const Module &module, Function &function) { Body(lexer, module, function).read(); }

}  // namespace ptx
