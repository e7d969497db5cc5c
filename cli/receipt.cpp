// The receipt is JSON, but neither written nor read as one tree: the origins of 100 000 tensors are many.
#include "cli/receipt.h"

#include "cli/report_files.h"
#include "formats/file_digest.h"
#include "formats/hash.h"
#include "formats/json.h"
#include "formats/kernels.h"
#include "libshard/error.h"
#include "libshard/inspectors.h"
#include "libshard/provenance.h"

#include <algorithm>
#include <sstream>

namespace cli {
namespace {

namespace fs = std::filesystem;
using shard::Code;
using shard::Finding;

constexpr int kVersion = 1;
constexpr int kDeepest = 64;

std::string text_of(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

/// Of tensors that every element is held of exactly once; others cannot be read in order, and are findings already.
shard::ShardedStateDict readable(shard::ShardedStateDict dict) {
  std::erase_if(dict.tensors, [](const auto& entry) {
    std::vector<Finding> findings;
    check_cover(entry.second, findings, 1);
    return !findings.empty();
  });
  return dict;
}

std::map<std::string, shard::Digest> digests_of(const formats::Checkpoint& checkpoint, std::optional<shard::Index> vocab, const shard::Budget& budget, bool quiet,
                                                std::vector<Finding>& findings) {
  const formats::LocalReader reader(readable(checkpoint.logical), checkpoint.files);
  ProgressBar bar("hashing", quiet);
  auto out = digest_tensors(reader, vocab, formats::hash_bytes, formats::kernels(), budget, findings, bar.callback());
  bar.clear();
  return out;
}

Json box_json(const shard::Box& box) { return {{"lo", box.lo}, {"size", box.size}}; }

/// The source's stored tensors, and once more, with the same key, where one is computed before it is read.
shard::ShardedStateDict traced(const formats::Checkpoint& source) {
  auto out = source.stored;
  for (const auto& [computed, place] : source.widened)
    for (auto& entry : out.tensors) {
      auto& shards = entry.second.shards;
      if (shards.size() != 1 || shards[0].place.stream != place.stream || shards[0].place.offset != place.offset) continue;
      shards.push_back(shards[0]);
      shards.back().place = {computed, 0, shard::row_major(shards[0].box.size)};
      for (auto& stride : shards.back().place.stride) stride *= static_cast<shard::Index>(sizeof(float));
    }
  return out;
}

Json origin_json(const formats::Checkpoint& source, const shard::Origin& origin) {
  const auto& stored = source.stored;
  const auto widened = source.widened.find(origin.shard->place.stream);
  const auto& place = widened == source.widened.end() ? origin.shard->place : widened->second;
  const auto& stream = stored.streams[place.stream];
  const auto file = stream.file < stored.files.size() ? stored.files[stream.file] : std::string();
  return {{"key", origin.tensor->key}, {"file", file}, {"offset", stream.offset + place.offset}, {"shard", box_json(origin.shard->box)}, {"box", box_json(origin.box)}};
}

void write_receipt(std::ostream& out, const ReceiptSource& input, const shard::Budget& budget, bool quiet) {
  auto options = input.open;
  options.drop.clear();
  options.iteration.reset();
  options.threads = budget.threads;
  const auto written = formats::open(input.published, options);
  std::vector<Finding> findings;
  const auto digests = digests_of(written, written.vocab, budget, quiet, findings);
  refuse(findings);
  out << fmt::format("{{\n  \"version\": {},\n  \"algorithm\": \"{}\",\n  \"model\": \"{}\",\n  \"vocab_size\": {},\n  \"files\": {{", kVersion, formats::kHashAlgorithm,
                     formats::hex(formats::combine(digests)), written.vocab ? std::to_string(*written.vocab) : "null");
  const char* comma = "\n";
  auto names = input.files;
  std::sort(names.begin(), names.end());
  for (const auto& name : names) {
    const auto file = formats::digest_file(input.published / name, budget);
    out << comma << "    " << text_of(name) << ": " << text_of({{"bytes", file.bytes}, {"digest", formats::hex(file.digest)}});
    comma = ",\n";
  }
  out << "\n  },\n  \"logical\": {";
  comma = "\n";
  for (const auto& [key, digest] : digests) {
    out << comma << "    " << text_of(key) << ": \"" << formats::hex(digest) << '"';
    comma = ",\n";
  }
  out << "\n  },\n  \"tensors\": {";
  comma = "\n";
  trace(input.plan, traced(input.source), input.target, [&](const shard::Provenance& one) {
    Json sources = Json::array();
    for (const auto& origin : one.origins) sources.push_back(origin_json(input.source, origin));
    auto transforms = one.transforms;
    if (transforms.erase("padded")) transforms.insert("padded with " + input.pad);
    out << comma << "    " << text_of(one.target->key) << ": "
        << text_of({{"dtype", shard::name(one.target->dtype)}, {"shape", one.target->global_shape}, {"transforms", transforms}, {"sources", std::move(sources)}});
    comma = ",\n";
  });
  out << "\n  }\n}";
}

using Tree = nlohmann::json;

Tree parse_without_origins(const std::string& path) {
  const formats::File file(path);
  std::ifstream in(path);
  const auto watch = [&](int depth, Tree::parse_event_t event, Tree& value) {
    shard::require(depth < kDeepest, Code::BadFormat, [&] { return fmt::format("{}: JSON is nested deeper than {}; should be a receipt", path, kDeepest); });
    // At depth 2 stand the receipt's own keys: of the origins nothing is kept.
    return !(event == Tree::parse_event_t::key && depth == 2 && value == "tensors");
  };
  try {
    return Tree::parse(in, watch);
  } catch (const Tree::exception& error) {
    shard::fail(Code::BadFormat, "{}: {}; should be a receipt, as --report writes it", path, formats::json_problem(error));
  }
}

bool is_digest(const Tree& value) {
  if (!value.is_string()) return false;
  const auto& text = value.get_ref<const std::string&>();
  return text.size() == 32 && std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

}  // namespace

void write_report(const std::string& path, Json summary, const std::optional<ReceiptSource>& receipt, const shard::Budget& budget, bool quiet) {
  std::ostringstream out;
  auto text = summary.dump(2, ' ', false, Json::error_handler_t::replace);
  if (receipt) {
    text.resize(text.rfind('\n'));  // before the closing brace
    out << text << ",\n\"receipt\": ";
    write_receipt(out, *receipt, budget, quiet);
    out << "\n}\n";
  } else {
    out << text << '\n';
  }
  write_text(path, out.view());
}

Receipt read_receipt(const std::string& path) {
  const auto tree = parse_without_origins(path);
  const auto check = [&](bool good, const char* what) {
    shard::require(good, Code::BadFormat, [&] { return fmt::format("{}: {}; should be a receipt, as --report writes it", path, what); });
  };
  check(tree.is_object() && tree.contains("receipt") && tree["receipt"].is_object(), "has no object 'receipt'");
  const auto& receipt = tree["receipt"];
  const auto get = [&](const char* key) { return receipt.contains(key) ? receipt[key] : Tree(); };
  check(get("version") == kVersion, "is of another version");
  check(get("algorithm") == formats::kHashAlgorithm, "has digests of another algorithm");
  Receipt out;
  const auto files = get("files"), logical = get("logical"), vocab = get("vocab_size");
  check(files.is_object() && logical.is_object(), "lacks 'files' or 'logical'");
  for (const auto& [name, entry] : files.items()) {
    check(entry.is_object() && entry.contains("bytes") && entry["bytes"].is_number_unsigned() && entry.contains("digest") && is_digest(entry["digest"]), "a file lacks its size or digest");
    out.files[name] = {entry["bytes"].get<std::uint64_t>(), entry["digest"].get<std::string>()};
  }
  for (const auto& [key, digest] : logical.items()) {
    check(is_digest(digest), "a tensor lacks its digest");
    out.tensors[key] = digest.get<std::string>();
  }
  check(vocab.is_null() || vocab.is_number_unsigned(), "'vocab_size' is no number");
  if (!vocab.is_null()) out.vocab = vocab.get<shard::Index>();
  return out;
}

std::vector<Finding> check_receipt(const Receipt& receipt, const formats::Checkpoint& checkpoint, const shard::Budget& budget, bool quiet) {
  std::vector<Finding> out;
  const auto add = [&](const char* rule, const std::string& key, std::string message) { out.push_back({rule, Finding::Severity::Error, key, std::move(message)}); };
  const auto root = fs::is_directory(checkpoint.path) ? checkpoint.path : checkpoint.folder;
  for (const auto& [name, wanted] : receipt.files) {
    const auto path = formats::inside(root, name);
    if (!fs::is_regular_file(path)) {
      add("missing", name, "the receipt lists this file");
      continue;
    }
    const auto found = formats::digest_file(path, budget);
    if (found.bytes != wanted.bytes) add("checksum", name, fmt::format("holds {} bytes; the receipt says {}", found.bytes, wanted.bytes));
    else if (formats::hex(found.digest) != wanted.digest) add("checksum", name, fmt::format("the file's digest is {}; the receipt says {}", formats::hex(found.digest), wanted.digest));
  }
  std::vector<Finding> ignored;  // recorded sums that do not match were found by the walk over all bytes
  const auto digests = digests_of(checkpoint, receipt.vocab ? receipt.vocab : checkpoint.vocab, budget, quiet, ignored);
  for (const auto& [key, wanted] : receipt.tensors) {
    const auto found = digests.find(key);
    if (!checkpoint.logical.tensors.contains(key)) add("missing", key, "the receipt lists this tensor");
    else if (found != digests.end() && formats::hex(found->second) != wanted) add("checksum", key, fmt::format("the tensor's digest is {}; the receipt says {}", formats::hex(found->second), wanted));
  }
  for (const auto& [key, tensor] : checkpoint.logical.tensors)
    if (!receipt.tensors.contains(key)) add("unexpected", key, "the receipt does not list this tensor");
  return out;
}

}  // namespace cli
