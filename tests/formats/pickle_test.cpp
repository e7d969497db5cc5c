// Reading and writing pickles: every value, every refusal, and bytes that try to exhaust the reader.
#include "formats/pickle.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "libshard/error.h"

namespace {

using namespace formats::pickle;
using namespace std::string_literals;

Graph parsed(const std::string& bytes) { return parse(std::as_bytes(std::span(bytes))); }

/// The error's text, "" where there is none.
std::string refusal(const std::string& bytes) {
  try {
    parsed(bytes);
    return "";
  } catch (const shard::Error& error) {
    CHECK(error.code == shard::Code::BadFormat);
    return error.what();
  }
}

bool refused(const std::string& bytes, std::string_view why) {
  const std::string text = refusal(bytes);
  INFO(text);
  const bool matches = text.find(why) != text.npos;
  CHECK_MESSAGE(matches, text);
  return matches;
}

std::string repeated(std::string_view part, std::size_t times) {
  std::string all;
  for (std::size_t i = 0; i < times; ++i) all += part;
  return all;
}

std::string text4(std::string_view text) {
  return "\x8c"s + static_cast<char>(text.size()) + std::string(text);
}

/// STACK_GLOBAL of a name.
std::string global4(std::string_view module, std::string_view name) {
  return text4(module) + text4(name) + "\x93";
}

std::string rewritten(const std::string& bytes, int protocol) {
  const Graph graph = parsed(bytes);
  return write(graph, graph.root, protocol);
}

/// {'a': [1, 2.5, None, True], 'b': ('x', b'\xff', {3}), 'c': OrderedDict(k=70000)}
Graph sample() {
  Graph graph;
  const Ref numbers =
      graph.list({graph.integer(std::int64_t{1}), graph.real(2.5), graph.none(), graph.boolean(true)});
  const Ref three = graph.integer(std::int64_t{3});
  const Ref mixed = graph.tuple({graph.text("x"), graph.bytes("\xff"), graph.set(std::span(&three, 1))});
  const Ref ordered = graph.object(graph.symbol("collections", "OrderedDict"), graph.empty_tuple(), false);
  graph.set(ordered, "k", graph.integer(std::int64_t{70000}));
  graph.root = graph.dict({graph.text("a"), numbers, graph.text("b"), mixed, graph.text("c"), ordered});
  return graph;
}

}  // namespace

TEST_CASE("pickle: scalars of every opcode") {
  const auto integer = [](const std::string& op) {
    const Graph graph = parsed("\x80\x02"s + op + ".");
    return graph.integer(graph.root);
  };
  CHECK(integer("K\xff"s) == 255);
  CHECK(integer("M\x01\x02"s) == 0x0201);
  CHECK(integer("J\xfe\xff\xff\xff"s) == -2);
  CHECK(integer("\x8a\x00"s) == 0);
  CHECK(integer("\x8a\x01\xff"s) == -1);
  CHECK(integer("\x8a\x02\xff\x00"s) == 255);
  CHECK(integer("\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80"s) == std::numeric_limits<std::int64_t>::min());
  CHECK(integer("\x8b\x01\x00\x00\x00\x05"s) == 5);
  CHECK(integer("I-12\n") == -12);
  CHECK(integer("L9223372036854775807L\n") == std::numeric_limits<std::int64_t>::max());
  CHECK(integer("L-9223372036854775808L\n") == std::numeric_limits<std::int64_t>::min());

  const Graph yes = parsed("I01\n.");
  CHECK(yes.kind(yes.root) == Kind::Bool);
  CHECK(yes.boolean(yes.root));
  const Graph big = parsed("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."s);
  CHECK(big.kind(big.root) == Kind::BigInt);
  const Graph decimal = parsed("L119547037146038801333356L\n.");
  CHECK(decimal.text(decimal.root) == big.text(big.root));
  const Graph half = parsed("G\x3f\xe0\0\0\0\0\0\0."s), line = parsed("F0.5\n.");
  CHECK(half.real(half.root) == 0.5);
  CHECK(line.real(line.root) == 0.5);
}

TEST_CASE("pickle: texts, bytes and containers") {
  Graph graph = parsed(
      "(U\x01"
      "aX\x01\0\0\0bC\x01"
      "cB\x01\0\0\0dT\x01\0\0\0el."s);
  std::string all;
  for (const Ref item : graph.items(graph.root)) all += graph.text(item);
  CHECK(all == "abcde");
  CHECK(graph.kind(graph.root) == Kind::List);

  graph = parsed("\x96\x02\0\0\0\0\0\0\0hi."s);
  CHECK(graph.is_object(graph.root, "builtins", "bytearray"));
  CHECK(graph.bytes_value(graph.root) == "hi");

  graph = parsed("}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u."s);
  CHECK(graph.items(graph.root).size() == 4);
  CHECK(graph.integer(*graph.find(graph.root, "a")) == 2);  // the last one wins
  CHECK_FALSE(graph.find(graph.root, "b"));

  graph = parsed("\x80\x04\x8f(K\x01K\x02\x90(K\x01\x91\x86."s);
  CHECK(graph.kind(graph.items(graph.root)[0]) == Kind::Set);
  CHECK(graph.kind(graph.items(graph.root)[1]) == Kind::FrozenSet);
  CHECK(graph.items(graph.items(graph.root)[0]).size() == 2);

  graph = parsed(
      "(K\x01K\x02K\x03K\x04t0K\x09(K\x05"
      "10(1K\x07."s.erase(0, 0));
  CHECK(graph.integer(graph.root) == 7);
  const std::string latin =
      "c_codecs\nencode\n(X\x04\0\0\0\xc3\xbf"
      "a\x01X\x06\0\0\0latin1tR."s;
  graph = parsed(latin);
  CHECK(graph.bytes_value(graph.root) ==
        "\xff"
        "a\x01");
  graph = parsed("c__builtin__\nbytes\n)R.");
  CHECK(graph.bytes_value(graph.root) == "");
}

TEST_CASE("pickle: objects keep how they were made") {
  const Graph graph = parsed(
      "\x80\x02"
      "cargparse\nNamespace\n)\x81}X\x02\0\0\0tpK\x02sb."s);
  CHECK(graph.is_object(graph.root, "argparse", "Namespace"));
  CHECK(graph.is_new(graph.root));
  CHECK(graph.integer(*graph.attribute(graph.root, "tp")) == 2);
  CHECK_FALSE(graph.attribute(graph.root, "pp"));

  const Graph slots = parsed(
      "\x80\x02"
      "cmy.lib\nThing\n)\x81N}X\x01\0\0\0aK\x07s\x86"
      "b."s);
  CHECK(slots.integer(*slots.attribute(slots.root, "a")) == 7);
  const Graph ex = parsed("\x80\x04" + global4("my.lib", "Thing") + ")}" + text4("k") + "K\x01s\x92."s);
  REQUIRE(ex.kwargs(ex.root));
  CHECK(ex.find(*ex.kwargs(ex.root), "k"));
}

TEST_CASE("pickle: a third-party class with arguments, items and state is written back") {
  const std::string made =
      "\x80\x02"
      "cmy.lib\nThing\n(K\x01K\x02K\x03K\x04tR(X\x01\0\0\0aK\x05X\x01\0\0\0bK\x06u}X\x01\0\0\0sNsb."s;
  CHECK(verdict("my.lib", "Thing") == Verdict::Record);
  CHECK(rewritten(made, 2) == made);
  const std::string list =
      "\x80\x02"
      "cmy.lib\nList\n)\x81(K\x01K\x02"
      "e."s;
  CHECK(rewritten(list, 2) == list);
  const Graph graph = parsed(list);
  CHECK_FALSE(graph.dict_items(graph.root));
  CHECK(graph.items(graph.root).size() == 2);
}

TEST_CASE("pickle: what the names mean") {
  CHECK(verdict("torch._utils", "_rebuild_tensor_v2") == Verdict::Build);
  CHECK(verdict("torch", "BFloat16Storage") == Verdict::Build);
  CHECK(verdict("torch.cuda", "FloatStorage") == Verdict::Build);
  CHECK(verdict("torch", "float8_e4m3fn") == Verdict::Build);
  CHECK(verdict("__builtin__", "set") == Verdict::Build);
  CHECK(verdict("torch.distributed.checkpoint.metadata", "Metadata") == Verdict::Build);
  CHECK(verdict("torch.distributed.device_mesh", "DeviceMesh") == Verdict::Record);
  CHECK(verdict("torch._utils", "_rebuild_qtensor") == Verdict::Record);
  CHECK(verdict("megatron.core.enums", "ModelType") == Verdict::Record);
  CHECK(verdict("transformer_engine.common.recipe", "Format") == Verdict::Record);
  CHECK(verdict("signal", "Signals") == Verdict::Record);
  for (const auto& row : {std::pair("posix", "system"),
                          {"os", "system"},
                          {"nt", "system"},
                          {"subprocess", "Popen"},
                          {"builtins", "eval"},
                          {"__builtin__", "eval"},
                          {"__builtin__", "getattr"},
                          {"copy_reg", "_reconstructor"},
                          {"commands", "getoutput"},
                          {"__main__", "x"},
                          {"Queue", "Queue"},
                          {"torch", "XStorage"},
                          {"cPickle", "loads"},
                          {"operator", "attrgetter"},
                          {"importlib", "import_module"},
                          {"os.path", "join"},
                          {"torch", "load"},
                          {"torch", "os.system"},
                          {"torch.hub", "load"},
                          {"torch", ""},
                          {"torch.jit", "load"},
                          {"torch.storage", "_load_from_bytes"},
                          {"torch.distributed", "x.y"},
                          {"numpy", "load"},
                          {"numpy.testing", "runstring"},
                          {"", "x"},
                          {"my.lib", "a.b"},
                          {"signal", "alarm"}}) {
    const std::string module = row.first, name = row.second;
    CAPTURE(module);
    CAPTURE(name);
    CHECK(verdict(module, name) == Verdict::Refuse);
  }
}

TEST_CASE("pickle: a refused name ends the reading, a scan lists it") {
  const std::string bad =
      "\x80\x02"
      "cposix\nsystem\nX\x02\0\0\0hi\x85R."s;
  refused(bad, "pickle byte 2: names posix.system; only tensors, containers and known classes may be built");
  refused("\x80\x04" + global4("torch", "os.system") + ".", "names torch.os.system");
  refused("c__builtin__\neval\n.", "names builtins.eval");
  refused("ccopy_reg\n_reconstructor\n.", "names copy_reg._reconstructor");
  refused("c\x1b[2J\nx\n.", "names ?[2J.x");  // no escape sequences reach the terminal
  CHECK(refusal("cos\x1b[2J\nx.y\n.").find('\x1b') == std::string::npos);

  const auto names = scan(std::as_bytes(std::span(bad)));
  REQUIRE(names.size() == 1);
  CHECK(names[0].module == "posix");
  CHECK(names[0].verdict == Verdict::Refuse);
  const std::string old = "(X\x02\0\0\0hiios\nsystem\n."s;
  refused(old, "opcode 0x69 'i' is not allowed");
  CHECK(scan(std::as_bytes(std::span(old)))[0].name == "system");
}

TEST_CASE("pickle: nested loaders only inside _extra_state") {
  const std::string bytes = "ctorch.storage\n_load_from_bytes\nC\x01z\x85R.";
  refused(bytes, "_load_from_bytes");
  const Graph graph = parse(std::as_bytes(std::span(bytes)), {.extra_state = true});
  CHECK(graph.is_object(graph.root, "torch.storage", "_load_from_bytes"));
}

TEST_CASE("pickle: stack, memo and opcodes are checked") {
  refused("", "ends within");
  refused("N", "ends within");
  refused(".", "empty stack");
  refused("\x80\x06N.", "protocol 6");
  refused("0.", "needs a MARK");
  refused("a.", "empty stack");
  refused("]a.", "empty stack");
  refused("Ns.", "empty stack");
  refused("N\x86.", "empty stack");
  refused("N(\x85.", "empty stack");
  refused("](a.", "empty stack");
  refused("(e.", "empty stack");
  refused("](((e.", "empty stack");
  refused("]e.", "needs a MARK");
  refused("}(Nu.", "a key without a value");
  refused("(Nd.", "a key without a value");
  refused("l.", "needs a MARK");
  refused(
      "N(K\x01"
      "e.",
      "adds items to a None");
  refused(")(NNu.", "sets items of a tuple");
  refused("](N\x90.", "adds items to a list");
  refused("N}b.", "gives state to a None");
  refused("N)R.", "calls a None");
  refused("ctorch\nSize\nNR.", "calls with a None");
  refused("cmy\nT\n)R}b}b.", "state to an object twice");
  refused("cmy\nT\n)R(Ne(NNu.", "object");
  refused("h\x00."s, "memo number 0 was never set");
  refused("q\x00."s, "empty stack");
  refused("N\x94h\x01."s, "memo number 1 was never set");
  refused("Nr\xff\xff\xff\x7f."s, "memo number 2147483647");
  refused("Np99999999999999999999\n.", "no number");
  refused("Ng-1\n.", "no number");
  refused("N.N", "1 bytes after its end");
  for (const char op : "P\x82\x83\x84oi\x97\x98SV@"s) refused("(N"s + op + "N\nN\n.", "is not allowed");
  refused("\x8c\x02\xff\xfe."s, "no UTF-8");
  refused("Iabc\n.", "an integer that is none");
  refused("L" + std::string(5000, '9') + "\n.", "more than 400 digits");
  refused("F1.2.3\n.", "a float that is none");
}

TEST_CASE("pickle: lengths are compared with what is there before anything is allocated") {
  refused("X\xff\xff\xff\xff."s, "ends within a value: 1 bytes left");
  refused("\x8d\0\0\0\0\0\0\0\x40."s, "ends within");
  refused("\x8e\xff\xff\xff\xff\xff\xff\xff\xff."s, "ends within");
  refused("\x96\xff\xff\xff\xff\xff\xff\xff\x7f."s, "ends within");
  refused("\x95\xff\xff\xff\xff\xff\xff\xff\x7fN."s, "ends within");
  refused("B\xff\xff\xff\xff."s, "ends within");
  refused("T\xff\xff\xff\xff."s, "negative length");
  refused("\x8b\xff\xff\xff\xff."s, "negative length");
  refused("\x8b\xff\xff\xff\x7f."s, "ends within");
  refused("\x8b\x00\x00\x02\x00"s + std::string(0x20000, '\x01') + ".", "an integer of 131072 bytes");
}

TEST_CASE("pickle: cut anywhere, it is refused") {
  const Graph graph = sample();
  for (const int protocol : {2, 4}) {
    const std::string bytes = write(graph, graph.root, protocol);
    for (std::size_t length = 0; length < bytes.size(); ++length) {
      CAPTURE(length);
      CHECK_THROWS_AS(parsed(bytes.substr(0, length)), shard::Error);
      CHECK_FALSE(parse_prefix(std::as_bytes(std::span(bytes)).first(length)));
    }
    const std::string longer = bytes + "rest";
    const auto prefix = parse_prefix(std::as_bytes(std::span(longer)));
    REQUIRE(prefix);
    CHECK(prefix->bytes == bytes.size());
  }
}

TEST_CASE("pickle: any byte changed, it is read or refused") {
  const Graph graph = sample();
  const std::string good = write(graph, graph.root, 4);
  for (std::size_t at = 0; at < good.size(); ++at) {
    for (int value = 0; value < 256; ++value) {
      std::string bytes = good;
      bytes[at] = static_cast<char>(value);
      try {
        const Graph read = parsed(bytes);
        parsed(write(read, read.root, 4));
      } catch (const shard::Error&) {
      }
    }
  }
}

TEST_CASE("pickle: 200000 nested lists are parsed, copied, written and destroyed") {
  constexpr std::size_t kDepth = 200'000;
  const std::string bytes = "\x80\x02" + repeated("]", kDepth) + repeated("a", kDepth - 1) + ".";
  Graph graph = parsed(bytes);
  Ref at = graph.root;
  for (std::size_t i = 1; i < kDepth; ++i) at = graph.items(at)[0];
  CHECK(graph.items(at).empty());
  CHECK(write(graph, graph.root, 2) == bytes);
  Graph copy;
  CHECK(write(copy, copy.import(graph, graph.root), 2) == bytes);
  const std::string tuples = "\x80\x02)" + repeated("\x85", kDepth) + ".";
  CHECK(rewritten(tuples, 2) == tuples);
}

TEST_CASE("pickle: a bomb of shared references is never expanded") {
  std::string bytes = "\x80\x02]q"s + '\0' + "N" + "a";
  for (char level = 1; level <= 40; ++level) {
    bytes += "](" + repeated("h"s + static_cast<char>(level - 1), 10) + "eq" + level;
  }
  const Graph graph = parsed(bytes + ".");
  const std::string written = write(graph, graph.root, 2);
  CHECK(written.size() < 2000);
  Graph copy;
  CHECK(write(copy, copy.import(graph, graph.root), 2) == written);
}

TEST_CASE("pickle: cycles are read, copied and written") {
  SUBCASE("a list and a dict that hold themselves") {
    for (const std::string& bytes : {"\x80\x02]q\0h\0a."s, "\x80\x02}q\0Nh\0s."s}) {
      CHECK(rewritten(bytes, 2) == bytes);
      const Graph graph = parsed(bytes);
      Graph copy;
      CHECK(write(copy, copy.import(graph, graph.root), 2) == bytes);
    }
  }
  SUBCASE("through a tuple and through arguments") {
    // t = ([t],) as Python writes it
    const Graph graph = parsed(
        "\x80\x02]q\0h\0\x85q\x01"
        "a0h\x01."s);
    const Graph again = parsed(write(graph, graph.root, 4));
    const Ref list = again.items(again.root)[0];
    CHECK(again.kind(again.root) == Kind::Tuple);
    CHECK(again.kind(list) == Kind::List);
    CHECK(again.items(list)[0] == again.root);
    const Graph object = parsed(
        "\x80\x02]q\0"
        "0cmy\nT\nh\0\x85Rq\x01h\0h\x01"
        "a0."s);
    const Graph copy = parsed(write(object, object.root, 2));
    CHECK(copy.items(copy.items(copy.args(copy.root))[0])[0] == copy.root);
  }
}

TEST_CASE("pickle: writing is the inverse of reading") {
  const Graph graph = sample();
  for (const int protocol : {2, 4}) {
    const std::string bytes = write(graph, graph.root, protocol);
    CHECK(rewritten(bytes, protocol) == bytes);
    const Graph read = parsed(bytes);
    const auto b = read.items(*read.find(read.root, "b"));
    CHECK(read.bytes_value(b[1]) == "\xff");
    CHECK(read.integer(*read.find(*read.find(read.root, "c"), "k")) == 70000);
  }
  CHECK(write(graph, graph.root, 2).find('\x95') == std::string::npos);
  CHECK_THROWS_AS(write(graph, graph.root, 3), shard::Error);
}

TEST_CASE("pickle: integers and floats keep every bit") {
  for (int bits = 0; bits < 63; ++bits) {
    for (const std::int64_t delta : {-1, 0, 1}) {
      for (const std::int64_t sign : {1, -1}) {
        const std::int64_t value = sign * ((std::int64_t{1} << bits) + delta);
        Graph graph;
        const Graph read = parsed(write(graph, graph.integer(value), 2));
        CHECK(read.integer(read.root) == value);
      }
    }
  }
  for (const double value : {0.0, -0.0, 1e-310, HUGE_VAL, -1.5}) {
    Graph graph;
    const Graph read = parsed(write(graph, graph.real(value), 2));
    CHECK(read.real(read.root) == value);
    CHECK(std::signbit(read.real(read.root)) == std::signbit(value));
  }
}

TEST_CASE("pickle: long containers are written in batches and read whole") {
  std::vector<Ref> items;
  Graph graph;
  for (std::int64_t i = 0; i < 2001; ++i) items.push_back(graph.integer(i));
  items.push_back(graph.text(std::string(70000, 'x')));
  const Ref list = graph.list(items);
  for (const int protocol : {2, 4}) {
    const Graph read = parsed(write(graph, list, protocol));
    REQUIRE(read.items(read.root).size() == 2002);
    CHECK(read.integer(read.items(read.root)[1999]) == 1999);
    CHECK(read.text(read.items(read.root)[2001]).size() == 70000);
  }
}

TEST_CASE("pickle: dicts can be changed in place") {
  Graph graph;
  const Ref dict = graph.dict({graph.text("a"), graph.none(), graph.text("b"), graph.none()});
  graph.set(dict, "b", graph.boolean(true));
  graph.set(dict, "c", graph.text("new"));
  graph.erase(dict, "a");
  graph.erase(dict, "absent");
  CHECK(graph.items(dict).size() == 4);
  CHECK_FALSE(graph.find(dict, "a"));
  CHECK(graph.boolean(*graph.find(dict, "b")));
  for (int i = 0; i < 100; ++i) graph.set(dict, std::to_string(i), graph.integer(std::int64_t{i}));
  for (int i = 0; i < 100; ++i) CHECK(graph.integer(*graph.find(dict, std::to_string(i))) == i);
  CHECK(graph.is_text(*graph.find(dict, "c"), "new"));
}

TEST_CASE("pickle: a node taken for another kind is an error") {
  Graph graph;
  const Ref text = graph.text("x"), list = graph.list({text});
  CHECK_THROWS_WITH_AS((void)graph.integer(text), "pickle: a text stands where a int should", shard::Error);
  CHECK_THROWS_AS((void)graph.text(list), shard::Error);
  CHECK_THROWS_AS((void)graph.items(text), shard::Error);
  CHECK_THROWS_AS((void)graph.callable(list), shard::Error);
  CHECK_FALSE(graph.bytes_value(list));
}

TEST_CASE("what leads to a node is found by one walk, in circles and through what is shared") {
  Graph graph;
  const auto id = graph.persistent(graph.text("id"));
  const auto shared = graph.list({id}), circle = graph.list({}), plain = graph.list({graph.text("x")});
  const auto made = graph.object(graph.symbol("a", "b"), graph.tuple({shared}), false);
  graph.append(circle, std::vector<Ref>{circle, made});
  const auto found = graph.leading_to([&](Ref ref) { return graph.kind(ref) == Kind::Persistent; });
  for (const auto ref : {id, shared, made, circle}) CHECK(found[ref]);
  CHECK_FALSE(found[plain]);
}
