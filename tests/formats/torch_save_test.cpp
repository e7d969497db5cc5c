// Files of torch.save: real ones, our own, and tensors that lie about their storage.
#include "formats/torch_save.h"

#include <doctest/doctest.h>

#include <limits>
#include <string>

#include "formats/crc32.h"
#include "formats/torch_storage.h"
#include "libshard/error.h"
#include "tests/formats/temporary_file.h"

namespace {

using namespace formats;
using pickle::Graph;
using pickle::Ref;
using shard::DType;
using shard::Shape;

constexpr DType kAll[] = {DType::F64,    DType::F32,    DType::F16,        DType::BF16,       DType::F8E4M3,
                          DType::F8E5M2, DType::F8E8M0, DType::F8E4M3FNUZ, DType::F8E5M2FNUZ, DType::F4E2M1x2,
                          DType::I64,    DType::I32,    DType::I16,        DType::I8,         DType::U64,
                          DType::U32,    DType::U16,    DType::U8,         DType::Bool,       DType::C64,
                          DType::C128};

std::uint32_t crc_of(std::string_view bytes) { return crc32(std::as_bytes(std::span(bytes))); }

/// A whole file; storage i is filled with the letter 'a' + i.
std::string torch_file(const Graph& graph, Ref root, const std::vector<std::uint64_t>& sizes) {
  const TorchLayout layout = torch_layout("name", pickle::write(graph, root, 2), sizes);
  std::string file(layout.zip.size(), '\0');
  std::vector<std::uint32_t> crcs(layout.zip.entries());
  const auto place = [&](std::size_t entry, const std::string& bytes) {
    REQUIRE(layout.zip.data_size(entry) == bytes.size());
    crcs[entry] = crc_of(bytes);
    file.replace(layout.zip.data_offset(entry), bytes.size(), bytes);
  };
  for (const auto& record : layout.small) place(record.entry, record.bytes);
  for (std::size_t i = 0; i < sizes.size(); ++i)
    place(layout.first_storage + i, std::string(sizes[i], static_cast<char>('a' + i)));
  for (const auto& [offset, bytes] : layout.zip.frame(crcs)) file.replace(offset, bytes.size(), bytes);
  return file;
}

std::string refusal(const std::string& bytes) {
  const TemporaryFile temporary(bytes);
  const File file = temporary.open();
  try {
    const TorchFile opened = open_torch(file);
    for (Ref ref = 0; ref < opened.graph.size(); ++ref) tensor_of(opened.graph, ref);
    return "";
  } catch (const shard::Error& error) {
    CHECK(error.code == shard::Code::BadFormat);
    return error.what();
  }
}

void check_refused(const std::string& bytes, std::string_view why) {
  const std::string text = refusal(bytes);
  CHECK_MESSAGE(text.find(why) != text.npos, text);
}

/// A tensor call with free choice of its arguments.
struct Made {
  Graph graph = Graph();
  std::string function = "_rebuild_tensor_v2";
  std::string module = "torch._utils";
  std::string storage_class = "FloatStorage";
  std::int64_t elements = 12, offset = 0;
  Shape sizes = {3, 4}, strides = {4, 1};
  std::vector<std::string> flags;

  Ref integers(const Shape& values) {
    std::vector<Ref> items;
    for (const auto value : values) items.push_back(graph.integer(value));
    return graph.tuple(items);
  }
  std::vector<Ref> arguments() {
    const Ref storage =
        graph.persistent(graph.tuple({graph.text("storage"), graph.symbol("torch", storage_class),
                                      graph.text("0"), graph.text("cpu"), graph.integer(elements)}));
    const Ref hooks = graph.object(graph.symbol("collections", "OrderedDict"), graph.empty_tuple(), false);
    std::vector<Ref> args = {storage,           graph.integer(offset), integers(sizes),
                             integers(strides), graph.boolean(false),  hooks};
    const Ref metadata = graph.dict({});
    for (const auto& flag : flags) graph.set(metadata, flag, graph.boolean(true));
    if (!flags.empty()) args.push_back(metadata);
    return args;
  }
  Ref tensor() { return graph.object(graph.symbol(module, function), graph.tuple(arguments()), false); }
  std::string error() {
    try {
      const auto found = tensor_of(graph, tensor());
      return found ? "" : "no tensor";
    } catch (const shard::Error& caught) {
      return caught.what();
    }
  }
};

}  // namespace

TEST_CASE("torch_save: a file that torch wrote") {
  const TemporaryFile temporary(test_data("torch/tensor.pt"));
  const File file = temporary.open();
  const TorchFile opened = open_torch(file);
  CHECK(opened.zip.root == "archive");
  CHECK(opened.zip.crcs_recorded);
  const auto tensor = tensor_of(opened.graph, opened.graph.root);
  REQUIRE(tensor);
  CHECK(tensor->dtype == DType::BF16);
  CHECK(tensor->sizes == Shape{4, 3});
  CHECK(tensor->strides == Shape{3, 1});
  CHECK(tensor->storage_bytes == 24);
  const ZipRecord& record = *opened.zip.find("data/" + tensor->storage);
  const std::string bytes = file.text(record.offset, record.size);
  CHECK(bytes.substr(0, 2) == "\x80\x3f");
  CHECK(crc_of(bytes) == record.crc32);
}

TEST_CASE("torch_save: an old stream that torch wrote") {
  const std::string bytes = test_data("torch/old_stream.pt");
  const TemporaryFile temporary("before" + bytes);
  const File file = temporary.open();
  const TorchFile opened = open_torch(file, 6, bytes.size());
  CHECK_FALSE(opened.zip.crcs_recorded);
  const auto b = tensor_of(opened.graph, *opened.graph.find(opened.graph.root, "b"));
  REQUIRE(b);
  CHECK(b->dtype == DType::I64);
  const ZipRecord& record = *opened.zip.find("data/" + b->storage);
  CHECK(record.size == 40);
  CHECK(file.text(record.offset + 8, 1) == "\x01");

  for (std::size_t length = 0; length < bytes.size(); ++length) {
    CAPTURE(length);
    CHECK_THROWS_AS(open_torch(file, 6, length), shard::Error);
  }
  check_refused(bytes + "x", "1 bytes after its end");
}

TEST_CASE("torch_save: what we write is read back, every dtype") {
  Graph graph;
  std::vector<Ref> tensors;
  std::vector<std::uint64_t> sizes;
  for (const DType dtype : kAll) {
    tensors.push_back(tensor_node(graph, dtype, std::to_string(sizes.size()), {2, 3}));
    sizes.push_back(6 * size_of(dtype));
  }
  const TemporaryFile temporary(torch_file(graph, graph.list(tensors), sizes));
  const File file = temporary.open();
  const TorchFile opened = open_torch(file);
  CHECK(opened.zip.root == "name");
  const auto read = opened.graph.items(opened.graph.root);
  REQUIRE(read.size() == std::size(kAll));
  for (std::size_t i = 0; i < read.size(); ++i) {
    const auto tensor = tensor_of(opened.graph, read[i]);
    REQUIRE(tensor);
    CHECK(tensor->dtype == kAll[i]);
    CHECK(tensor->sizes == Shape{2, 3});
    CHECK(tensor->storage_bytes == sizes[i]);
    const ZipRecord& record = *opened.zip.find("data/" + tensor->storage);
    CHECK(file.text(record.offset, record.size) == std::string(sizes[i], static_cast<char>('a' + i)));
    CHECK(record.crc32 == crc_of(file.text(record.offset, record.size)));
  }
  CHECK(opened.zip.find(".data/serialization_id")->size == 40);
}

TEST_CASE("torch_save: scalars, empty tensors and views of one storage") {
  Graph graph;
  const Ref scalar = tensor_node(graph, DType::F32, "0", {});
  const Ref empty = tensor_node(graph, DType::F32, "0", {0, 4});
  const Ref view = tensor_node(graph, DType::F32, "0", {2, 2}, 3, 7);
  CHECK(tensor_of(graph, scalar)->sizes.empty());
  CHECK(tensor_of(graph, empty)->storage_bytes == 0);
  CHECK(tensor_of(graph, view)->offset == 12);
  CHECK(tensor_of(graph, view)->storage_bytes == 28);
  CHECK_FALSE(tensor_of(graph, graph.none()));
  CHECK_FALSE(tensor_of(graph, size_node(graph, {1})));
  CHECK(shape_of(graph, size_node(graph, {1, 2})) == Shape{1, 2});
  CHECK(dtype_of(graph, dtype_node(graph, DType::F8E4M3)) == DType::F8E4M3);
  CHECK_FALSE(dtype_of(graph, graph.symbol("torch", "Size")));
  CHECK_FALSE(dtype_of(graph, graph.symbol("torch", "BF16")));
}

TEST_CASE("torch_save: tensors stay within their storage") {
  constexpr auto kMost = std::numeric_limits<std::int64_t>::max();
  CHECK(Made().error() == "");
  const auto error = [](auto change) {
    Made made;
    change(made);
    return made.error();
  };
  const std::string kOutside = "do not fit";
  const auto outside = [&](auto change) {
    const std::string text = error(change);
    CHECK_MESSAGE(text.find(kOutside) != text.npos, text);
  };
  outside([](Made& m) { m.sizes = {4, 4}; });
  outside([](Made& m) { m.offset = 1; });
  outside([](Made& m) { m.offset = kMost; });
  outside([](Made& m) { m.strides = {5, 1}; });
  outside([](Made& m) { m.strides = {kMost, kMost}; });
  outside([](Made& m) { m.elements = 11; });
  outside([](Made& m) { m.elements = 0; });
  CHECK(error([](Made& m) { m.strides = {0, 1}; }) == "");  // expanded
  CHECK(error([](Made& m) { m.sizes = {1 << 10, 1 << 20}, m.strides = {0, 0}; })  // without end, in a few bytes
            .find("repeat the 48 bytes of storage") != std::string::npos);
  CHECK(error([](Made& m) { m.strides = {1, 3}; }) == "");  // transposed
  CHECK(error([](Made& m) { m.offset = -1; }) != "");
  CHECK(error([](Made& m) { m.strides = {-1, 1}; }).find("negative strides") != std::string::npos);
  CHECK(error([](Made& m) { m.sizes = {-3, -4}; }).find("negative sizes") != std::string::npos);
  CHECK(error([](Made& m) { m.sizes = {3}; }) != "");
  CHECK(error([](Made& m) { m.elements = -1; }) != "");
  CHECK(error([](Made& m) { m.elements = kMost; }) != "");
  CHECK(error([](Made& m) { m.sizes = {kMost, kMost}, m.strides = {0, 0}; }) != "");
  CHECK(error([](Made& m) { m.sizes = {kMost, 1}, m.strides = {0, 0}; }) != "");
}

TEST_CASE("torch_save: kinds of tensors that are refused by name") {
  const auto error = [](auto change) {
    Made made;
    change(made);
    return made.error();
  };
  CHECK(error([](Made& m) { m.flags = {"conj"}; }).find("conj") != std::string::npos);
  CHECK(error([](Made& m) { m.flags = {"neg"}; }).find("neg") != std::string::npos);
  CHECK(error([](Made& m) { m.function = "_rebuild_qtensor"; }).find("_rebuild_qtensor") !=
        std::string::npos);
  CHECK(error([](Made& m) { m.function = "_rebuild_sparse_tensor"; }).find("_rebuild_sparse_tensor") !=
        std::string::npos);
  CHECK(error([](Made& m) { m.storage_class = "QInt8Storage"; }).find("quantised") != std::string::npos);
  CHECK(error([](Made& m) { m.storage_class = "UntypedStorage"; }).find("dtype") != std::string::npos);
  CHECK(error([](Made& m) { m.storage_class = "float32"; }).find("not known") != std::string::npos);
  CHECK(error([](Made& m) { m.module = "my.lib"; }) == "no tensor");
}

TEST_CASE("torch_save: parameters and tensors with attributes are unwrapped") {
  Made made;
  Graph& graph = made.graph;
  const auto call = [&](const char* module, const char* name, std::initializer_list<Ref> args) {
    return graph.object(graph.symbol(module, name), graph.tuple(args), false);
  };
  const Ref hooks = call("collections", "OrderedDict", {});
  const Ref parameter =
      call("torch._utils", "_rebuild_parameter", {made.tensor(), graph.boolean(true), hooks});
  CHECK(tensor_of(graph, parameter)->sizes == Shape{3, 4});
  const Ref with_state = call("torch._utils", "_rebuild_parameter_with_state",
                              {parameter, graph.boolean(true), hooks, graph.dict({})});
  CHECK(tensor_of(graph, with_state)->sizes == Shape{3, 4});
  const Ref v2 = graph.symbol("torch._utils", "_rebuild_tensor_v2");
  const Ref args = graph.tuple(made.arguments());
  const Ref plain = call("torch._tensor", "_rebuild_from_type_v2",
                         {v2, graph.symbol("torch", "Tensor"), args, graph.dict({})});
  CHECK(tensor_of(graph, plain)->sizes == Shape{3, 4});
  const Ref subclass = call("torch._tensor", "_rebuild_from_type_v2",
                            {v2, graph.symbol("torch.distributed.tensor", "DTensor"), args, graph.dict({})});
  CHECK_THROWS_WITH_AS(tensor_of(graph, subclass), doctest::Contains("DTensor"), shard::Error);
  Ref nested = made.tensor();
  for (int i = 0; i < 100; ++i) nested = call("torch._utils", "_rebuild_parameter", {nested});
  CHECK_THROWS_AS(tensor_of(graph, nested), shard::Error);
}

TEST_CASE("torch_save: storages of old streams may be views") {
  Graph graph;
  const auto number = [&](std::int64_t value) { return graph.integer(value); };
  const auto storage = [&](std::int64_t begin, std::int64_t count) {
    const Ref view = graph.tuple({graph.text("v"), number(begin), number(count)});
    return graph.persistent(graph.tuple({graph.text("storage"), graph.symbol("torch", "FloatStorage"),
                                         graph.text("k"), graph.text("cpu"), number(10), view}));
  };
  const auto id = storage_of(graph, storage(4, 6));
  REQUIRE(id);
  CHECK(id->view_begin == 16);
  CHECK(id->view_bytes == 24);
  CHECK(id->bytes == 40);
  CHECK_THROWS_AS(storage_of(graph, storage(5, 6)), shard::Error);
  CHECK_THROWS_AS(storage_of(graph, storage(-1, 6)), shard::Error);
}

TEST_CASE("torch_save: the records have to hold what the pickle says") {
  Graph graph;
  const Ref tensor = tensor_node(graph, DType::F32, "0", {4});
  CHECK(refusal(torch_file(graph, tensor, {16})) == "");
  CHECK(refusal(torch_file(graph, tensor, {20})) == "");
  check_refused(torch_file(graph, tensor, {15}), "record 'data/0' has 15 bytes; storage '0' has 16");
  check_refused(torch_file(graph, tensor, {}), "no record 'data/0'");
  std::string flipped = torch_file(graph, tensor, {16});
  flipped[70] = static_cast<char>(flipped[70] ^ 1);
  check_refused(flipped, "data.pkl: CRC-32");
  std::string big = torch_file(graph, tensor, {16});
  big.replace(big.find("little"), 6, "bigger");
  check_refused(big, "only little-endian");
}

TEST_CASE("torch_save: other containers are named") {
  check_refused("", "empty file");
  check_refused(std::string(257, '\0') + "ustar" + std::string(250, '\0'), "tar file");
  check_refused(std::string("\x08\0\0\0\0\0\0\0{\"a\":1} ", 16), "safetensors");
  check_refused("hello world", "no torch.save file");
  check_refused(std::string("\x80\x02N."), "a pickle, but no torch.save file");
  check_refused("PK\x03\x04 and nothing else", "truncated?");
  Graph graph;
  std::string script = torch_file(graph, graph.none(), {});
  for (std::size_t at; (at = script.find(".data/serialization_id")) != script.npos;) {
    script.replace(at, 22, "code/__torch__/x.pyxxx");
  }
  check_refused(script, "TorchScript");
}

TEST_CASE("torch_save: cut anywhere or changed anywhere, it is read or refused") {
  const std::string good = test_data("torch/tensor.pt");
  const TemporaryFile temporary(good);
  const File file = temporary.open();
  for (std::size_t length = 0; length < good.size(); ++length) {
    CAPTURE(length);
    CHECK_THROWS_AS(open_torch(file, 0, length), shard::Error);
  }
  for (std::size_t at = 0; at < good.size(); ++at) {
    std::string bytes = good;
    bytes[at] = static_cast<char>(bytes[at] ^ 0x41);
    refusal(bytes);
  }
}
