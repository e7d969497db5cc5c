// Shapes are checked before values are trusted; numbers are compared in f64.
#include "cli/reference.h"

#include "formats/file.h"
#include "formats/json.h"
#include "formats/hf/state.h"
#include "formats/tokenizer.h"
#include "formats/safetensors/header.h"
#include "libshard/error.h"
#include "lm/message.h"
#include "libshard/numeric.h"

#include <algorithm>
#include <charconv>
#include <cmath>

namespace cli {
namespace {

using shard::Code;
using shard::Index;

constexpr std::uint64_t kLongestNpyHeader = (1 << 16) + 12;

std::vector<Index> integers(const Arrays::Array& array, const std::string& name) {
  std::vector<Index> out;
  for (const auto value : array.values) {
    shard::require(value == std::floor(value), Code::BadFormat, [&] { return fmt::format("{}: holds {}; should hold integers", name, value); });
    shard::require(std::abs(value) < 9e15, Code::BadFormat, [&] { return fmt::format("{}: holds {:.0f}; should hold ids or positions, which are smaller", name, value); });
    out.push_back(static_cast<Index>(value));
  }
  return out;
}

std::string reference_name(const std::string& name) { return name.substr(0, name.find('.')); }
bool wanted_reference(const std::string& name) {
  const auto head = reference_name(name);
  return name == "input_ids" || name == "labels" || name == "position_ids" || name == "logits" || name == "loss" || head == "mtp" || head == "mtp_step";
}

Index count_of(const shard::Shape& shape, const std::string& path) {
  try {
    return shard::volume(shape);
  } catch (const shard::Error& error) {
    throw error.within(path);
  }
}

void refuse_more_ids(std::uint64_t count, const std::string& path) {
  shard::require(count <= formats::kMostIds, Code::BadFormat, [&] { return fmt::format("{}: holds {} token ids; at most {} make sense", path, count, formats::kMostIds); });
}

std::vector<std::vector<Index>> npy_rows(const formats::File& file, const std::string& path) {
  const auto text = file.text(0, std::min(file.size(), kLongestNpyHeader));  // what stands behind it is looked at when its size is known
  const std::size_t at = text.size() > 7 && text[6] == 1 ? 10 : 12;
  shard::require(text.size() > at, Code::BadFormat, [&] { return fmt::format("{}: ends inside its header", path); });
  std::size_t length = 0;  // 2 bytes, or 4 from version 2 on
  for (auto i = at; i > 8; --i) length = length << 8 | static_cast<unsigned char>(text[i - 1]);
  shard::require(length <= text.size() - at, Code::BadFormat, [&] { return fmt::format("{}: ends inside its header", path); });
  const auto header = text.substr(at, length);
  const auto value_of = [&](const char* key) {
    const auto found = header.find(key);
    shard::require(found != header.npos, Code::BadFormat, [&] { return fmt::format("{}: header lacks {}", path, key); });
    return header.substr(found + std::string(key).size());
  };
  const auto descr = value_of("'descr':");
  const auto open = descr.find('\''), close = descr.find('\'', open + 1);
  shard::require(open != descr.npos && close != descr.npos, Code::BadFormat, [&] { return fmt::format("{}: has no plain type", path); });
  const auto type = descr.substr(open + 1, close - open - 1);
  shard::require(type.size() == 3 && (type[0] == '<' || type[0] == '|' || type[0] == '=') && (type[1] == 'i' || type[1] == 'u') && std::string("1248").find(type[2]) != std::string::npos, Code::BadFormat,
                 [&] { return fmt::format("{}: holds '{}'; little-endian integers are known", path, type); });
  shard::require(value_of("'fortran_order':").find("True") > 2, Code::BadFormat, [&] { return fmt::format("{}: is in Fortran order; should be in C order", path); });
  const auto tuple = value_of("'shape':");
  std::vector<Index> shape;
  for (std::size_t i = tuple.find('(') + 1; i < tuple.size() && tuple[i] != ')';) {
    Index value = 0;
    const auto [end, error] = std::from_chars(tuple.data() + i, tuple.data() + tuple.size(), value);
    if (error == std::errc()) shape.push_back(value);
    i = error == std::errc() ? static_cast<std::size_t>(end - tuple.data()) : i + 1;
  }
  shard::require(shape.size() == 1 || shape.size() == 2, Code::BadFormat, [&] { return fmt::format("{}: has shape {}; should be [n] or [b,n]", path, shard::to_string(shape)); });
  const auto item = static_cast<std::size_t>(type[2] - '0');
  const auto count = count_of(shape, path);
  refuse_more_ids(static_cast<std::uint64_t>(count), path);
  shard::require(static_cast<std::uint64_t>(count) <= (file.size() - at - length) / item, Code::BadFormat, [&] { return fmt::format("{}: ends before its last number", path); });
  std::vector<std::byte> bytes(static_cast<std::size_t>(count) * item);
  file.read(at + length, bytes);
  const auto columns = shape.back();
  std::vector<std::vector<Index>> rows;
  for (Index i = 0; i < count; ++i) {
    if (i % columns == 0) rows.emplace_back();
    const auto* from = bytes.data() + static_cast<std::size_t>(i) * item;
    std::uint64_t raw = 0;
    std::memcpy(&raw, from, item);
    if (type[1] == 'i' && item < 8 && (raw >> (8 * item - 1) & 1)) raw |= ~std::uint64_t{0} << (8 * item);
    shard::require(type[1] == 'i' || raw >> 63 == 0, Code::BadFormat, [&] { return fmt::format("{}: holds {}; should hold token ids", path, raw); });
    rows.back().push_back(static_cast<Index>(raw));
  }
  return rows;
}

std::vector<std::vector<Index>> text_rows(const std::string& text, const std::string& path) {
  std::vector<std::vector<Index>> rows(1);
  std::uint64_t count = 0;
  for (std::size_t i = 0; i < text.size();) {
    const char c = text[i];
    if ((c == '\n' || c == ']') && !rows.back().empty()) rows.emplace_back();
    if (std::isspace(static_cast<unsigned char>(c)) || c == ',' || c == '[' || c == ']') {
      ++i;
      continue;
    }
    Index value = 0;
    const auto [end, error] = std::from_chars(text.data() + i, text.data() + text.size(), value);
    shard::require(error == std::errc(), Code::BadFormat, [&] { return fmt::format("{}: byte {} begins no token id", path, i); });
    refuse_more_ids(++count, path);
    rows.back().push_back(value);
    i = static_cast<std::size_t>(end - text.data());
  }
  if (rows.back().empty()) rows.pop_back();
  return rows;
}

Arrays::Array read_array(const formats::File& file, const formats::safetensors::Header& header, const formats::safetensors::Entry& entry) {
  std::vector<std::byte> bytes(entry.end - entry.begin);
  file.read(header.data_offset + entry.begin, bytes);
  Arrays::Array out{entry.shape, {}};
  const auto item = size_of(entry.dtype);
  out.values.reserve(bytes.size() / item);
  for (std::size_t i = 0; i < bytes.size(); i += item) out.values.push_back(shard::value_at(bytes.data() + i, entry.dtype));
  return out;
}

/// Only the ids are read: the file may be any.
std::vector<std::vector<Index>> safetensors_rows(const formats::File& file, const std::string& path) {
  const auto header = formats::safetensors::read_header(file);
  auto ids = std::find_if(header.entries.begin(), header.entries.end(), [](const auto& entry) { return entry.name == "input_ids"; });
  if (ids == header.entries.end() && header.entries.size() == 1) ids = header.entries.begin();
  shard::require(ids != header.entries.end() && (ids->shape.size() == 1 || ids->shape.size() == 2), Code::BadFormat, [&] { return fmt::format("{}: should hold input_ids [n] or [b,n]", path); });
  refuse_more_ids(static_cast<std::uint64_t>(count_of(ids->shape, path)), path);
  const auto flat = integers(read_array(file, header, *ids), path);
  const auto columns = static_cast<std::size_t>(ids->shape.back());
  std::vector<std::vector<Index>> rows;
  for (std::size_t i = 0; columns && i < flat.size(); i += columns) rows.emplace_back(flat.begin() + static_cast<std::ptrdiff_t>(i), flat.begin() + static_cast<std::ptrdiff_t>(i + columns));
  return rows;
}

}  // namespace

double distance(double a, double b) {
  if (a == b || (a != a && b != b)) return 0;
  const auto out = std::abs(a - b);
  return out == out ? out : INFINITY;
}

const Arrays::Array* Arrays::find(const std::string& name) const {
  const auto found = arrays.find(name);
  return found == arrays.end() ? nullptr : &found->second;
}

Arrays read_arrays(const std::string& path, bool (*wanted)(const std::string&)) {
  const formats::File file(path);
  const auto header = formats::safetensors::read_header(file);
  Arrays out;
  for (const auto& entry : header.entries)
    if (wanted(entry.name)) out.arrays[entry.name] = read_array(file, header, entry);
  return out;
}

Reference read_reference(const std::string& path, Index hidden) {
  Reference out;
  out.arrays = read_arrays(path, wanted_reference);
  const auto need = [&](const char* name) -> const Arrays::Array& {
    const auto* array = out.arrays.find(name);
    shard::require(array && array->shape.size() == 2, Code::BadFormat, [&] { return fmt::format("{}: should hold {} [b,s]", path, name); });
    return *array;
  };
  const auto& ids = need("input_ids");
  out.batch.batch = ids.shape[0];
  out.batch.length = ids.shape[1];
  shard::require(out.batch.batch > 0 && out.batch.length > 0, Code::BadFormat, [&] { return fmt::format("{}: input_ids is empty", path); });
  const auto same = [&](const char* name, const Arrays::Array& array, std::size_t leading) {
    shard::require(array.shape.size() >= leading && array.shape[0] == ids.shape[0] && array.shape[1] == ids.shape[1], Code::BadFormat,
                   [&] { return fmt::format("{}: {} has shape {}; input_ids has {}", path, name, shard::to_string(array.shape), shard::to_string(ids.shape)); });
  };
  out.batch.input_ids = integers(ids, path + ": input_ids");
  same("labels", need("labels"), 2);
  out.batch.labels = integers(need("labels"), path + ": labels");
  shard::require(std::any_of(out.batch.labels.begin(), out.batch.labels.end(), [](Index id) { return id >= 0; }), Code::BadFormat,
                 [&] { return fmt::format("{}: labels are all negative, which leaves nothing to be judged", path); });
  if (out.arrays.find("position_ids")) {
    same("position_ids", need("position_ids"), 2);
    out.batch.position_ids = integers(need("position_ids"), path + ": position_ids");
  } else {
    for (Index i = 0; i < ids.shape[0] * ids.shape[1]; ++i) out.batch.position_ids.push_back(i % ids.shape[1]);
  }
  for (const auto& entry : out.arrays.arrays) {
    const auto& name = entry.first;
    const auto& array = entry.second;
    if (name == "loss") same("loss", array, 2);
    if (name == "logits" || (name.starts_with("mtp.") && name.ends_with(".logits"))) {
      same(name.c_str(), array, 2);
      shard::require(array.shape.size() == 3 && (out.vocab == 0 || out.vocab == array.shape[2]), Code::BadFormat, [&] { return fmt::format("{}: {} should be [b,s,V]", path, name); });
      shard::require(array.shape[2] > 0, Code::BadFormat, [&] { return fmt::format("{}: {} has no columns", path, name); });
      out.vocab = array.shape[2];
    }
    if (name.starts_with("mtp.") && (name.ends_with(".loss") || name.ends_with(".labels"))) same(name.c_str(), array, 2);
  }
  for (Index depth = 0; depth < kMostDepths; ++depth) {
    const auto prefix = fmt::format("mtp_step.{}.", depth);
    const auto *in = out.arrays.find(prefix + "in_hidden"), *next = out.arrays.find(prefix + "next_token_ids"), *at = out.arrays.find(prefix + "position_ids");
    const auto first = out.arrays.arrays.lower_bound(prefix);
    if (first == out.arrays.arrays.end() || !first->first.starts_with(prefix)) continue;
    shard::require(in && next, Code::BadFormat, [&] { return fmt::format("{}: {} should come with {}in_hidden and {}next_token_ids", path, first->first, prefix, prefix); });
    const auto rows = static_cast<Index>(next->values.size());
    shard::require(rows > 0, Code::BadFormat, [&] { return fmt::format("{}: {}next_token_ids is empty", path, prefix); });
    shard::require(static_cast<Index>(in->values.size()) == rows * hidden, Code::BadFormat,
                   [&] { return fmt::format("{}: {}in_hidden has shape {}; {} tokens of {} numbers are expected", path, prefix, shard::to_string(in->shape), rows, hidden); });
    const auto fits = [&](const char* name, const Arrays::Array* array, std::size_t numbers) {
      shard::require(!array || (numbers && array->values.size() == numbers), Code::BadFormat,
                     [&] { return fmt::format("{}: {}{} has shape {}; {} tokens are given", path, prefix, name, shard::to_string(array->shape), rows); });
    };
    fits("position_ids", at, next->values.size());
    fits("hidden", out.arrays.find(prefix + "hidden"), in->values.size());
    if (const auto* logits = out.arrays.find(prefix + "logits")) {
      const auto columns = logits->shape.empty() ? 0 : static_cast<std::size_t>(logits->shape.back());
      fits("logits", logits, next->values.size() * columns);
    }
    lm::MtpStep step;
    step.depth = depth;
    step.in_hidden = lm::Tensor(rows, hidden);
    std::transform(in->values.begin(), in->values.end(), step.in_hidden.values().begin(), [](double v) { return static_cast<float>(v); });
    step.next_token_ids = integers(*next, path + ": " + prefix + "next_token_ids");
    if (at) step.position_ids = integers(*at, path + ": " + prefix + "position_ids");
    step.position_ids.resize(static_cast<std::size_t>(rows), 0);
    out.steps.push_back(std::move(step));
  }
  return out;
}

lm::Batch batch_of(const std::vector<std::vector<Index>>& rows, const std::string& where) {
  shard::require(!rows.empty() && rows[0].size() >= 2, Code::BadFormat, [&] { return fmt::format("{}: holds fewer than two tokens", where); });
  lm::Batch out;
  out.batch = static_cast<Index>(rows.size());
  out.length = static_cast<Index>(rows[0].size()) - 1;
  for (const auto& row : rows) {
    shard::require(row.size() == rows[0].size(), Code::BadFormat, [&] { return fmt::format("{}: rows of {} and {} tokens; should be equally long", where, rows[0].size(), row.size()); });
    out.input_ids.insert(out.input_ids.end(), row.begin(), row.end() - 1);
    out.labels.insert(out.labels.end(), row.begin() + 1, row.end());
    for (Index i = 0; i < out.length; ++i) out.position_ids.push_back(i);
  }
  return out;
}

lm::Batch read_tokens(const std::string& path) {
  const formats::File file(path);
  const auto magic = file.text(0, std::min<std::uint64_t>(file.size(), 9));
  if (magic.starts_with("\x93NUMPY")) return batch_of(npy_rows(file, path), path);
  if (magic.size() == 9 && magic[8] == '{') return batch_of(safetensors_rows(file, path), path);
  return batch_of(text_rows(formats::read_text(path, 16 * formats::kMostIds), path), path);
}

lm::Batch read_text_tokens(const std::string& path, const formats::Checkpoint& checkpoint, Index longest, const std::atomic<bool>* stop) {
  const auto folder = checkpoint.hf ? checkpoint.hf->folder : checkpoint.folder;
  const auto tokenizer = formats::inside(folder, "tokenizer.json");
  shard::require(std::filesystem::exists(tokenizer), Code::Mismatch,
                 [&] { return fmt::format("{}: holds no tokenizer.json; give token ids with --tokens", folder.string()); });
  const auto ids = formats::Tokenizer(tokenizer).encode(formats::read_text(path, formats::kLargestText), path, stop);
  shard::require(ids.size() >= 2, Code::Mismatch, [&] { return fmt::format("{}: is less than two tokens", path); });
  const auto row = std::min(ids.size(), static_cast<std::size_t>(std::max<Index>(longest, 1)) + 1);
  std::vector<std::vector<Index>> rows;
  for (std::size_t at = 0; at + row <= ids.size(); at += row - 1)  // each row begins with the last label of the one before
    rows.emplace_back(ids.begin() + static_cast<std::ptrdiff_t>(at), ids.begin() + static_cast<std::ptrdiff_t>(at + row));
  return batch_of(rows, path);
}

Comparer::Comparer(const Reference& reference, Index depths) : mtp(static_cast<std::size_t>(depths)), steps(reference.steps.size()), reference_(reference) {}

void Comparer::on_logits(const lm::LogitsBlock& block) {
  const bool is_step = block.of == lm::LogitsBlock::Of::Step;
  const auto name = block.of == lm::LogitsBlock::Of::Main ? "logits" : is_step ? fmt::format("mtp_step.{}.logits", reference_.steps[static_cast<std::size_t>(block.index)].depth) : fmt::format("mtp.{}.logits", block.index);
  const auto* wanted = reference_.arrays.find(name);
  if (!wanted || wanted->shape.empty()) return;
  const auto vocab = wanted->shape.back();
  if (static_cast<Index>(wanted->values.size()) != vocab * block.values.rows()) return;
  const auto columns = std::min(block.values.columns(), vocab - block.first_column);
  double most = 0, peak = 0, wanted_peak = 0, sum = 0;
  for (Index r = 0; r < block.values.rows(); ++r)
    for (Index c = 0; c < columns; ++c) {
      const auto want = wanted->values[static_cast<std::size_t>(r * vocab + block.first_column + c)];
      const auto found = static_cast<double>(block.values.row(r)[c]);
      const auto off = distance(want, found);
      most = std::max(most, off);
      sum += off;
      if (std::isfinite(found)) peak = std::max(peak, std::abs(found));
      if (std::isfinite(want)) wanted_peak = std::max(wanted_peak, std::abs(want));
    }
  if (is_step) {
    auto& step = steps[static_cast<std::size_t>(block.index)];
    step.logits = true;
    step.max_abs_logits = std::max(step.max_abs_logits, most);
    return;
  }
  auto& into = block.of == lm::LogitsBlock::Of::Main ? main : mtp[static_cast<std::size_t>(block.index)];
  into.logits = true;
  into.max_abs_logits = std::max(into.max_abs_logits, most);
  into.peak = std::max(into.peak, peak);
  into.wanted_peak = std::max(into.wanted_peak, wanted_peak);
  into.sum_abs_logits += sum;
  into.logits_compared += static_cast<double>(block.values.rows() * std::max<Index>(columns, 0));
}

std::string Comparer::tell() const {
  lm::MessageWriter out;
  out(main, mtp, steps);
  return out.text();
}

void Comparer::hear(std::string_view text) {
  Figures other;
  std::vector<Figures> of_mtp;
  std::vector<Step> of_steps;
  lm::MessageReader in(text);
  in(other, of_mtp, of_steps);
  const auto join = [](Figures& mine, const Figures& theirs) {
    mine.logits = mine.logits || theirs.logits;
    mine.max_abs_logits = std::max(mine.max_abs_logits, theirs.max_abs_logits);
    mine.peak = std::max(mine.peak, theirs.peak);
    mine.wanted_peak = std::max(mine.wanted_peak, theirs.wanted_peak);
    mine.sum_abs_logits += theirs.sum_abs_logits;
    mine.logits_compared += theirs.logits_compared;
  };
  join(main, other);
  for (std::size_t k = 0; k < std::min(mtp.size(), of_mtp.size()); ++k) join(mtp[k], of_mtp[k]);
  for (std::size_t s = 0; s < std::min(steps.size(), of_steps.size()); ++s) {
    steps[s].logits = steps[s].logits || of_steps[s].logits;
    steps[s].max_abs_logits = std::max(steps[s].max_abs_logits, of_steps[s].max_abs_logits);
  }
}

void Comparer::losses(const Arrays::Array* wanted, const std::vector<float>& found, const std::vector<Index>& labels, Figures& into, std::size_t length, std::size_t rolled) {
  if (!wanted || wanted->values.size() != found.size() || labels.size() != found.size()) return;
  double sum = 0, count = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (labels[i] < 0) continue;  // left out, as a loss mask would; what others store there is a matter of taste
    const auto off = distance(wanted->values[i], static_cast<double>(found[i]));
    into.loss = true;
    into.max_abs_loss = std::max(into.max_abs_loss, off);
    if (i % length + rolled >= length) continue;  // a label rolled in from nowhere
    sum += off;
    ++count;
  }
  into.mean_abs_loss = count > 0 ? sum / count : 0;
}

void Comparer::finish(const lm::ForwardResult& result) {
  const auto length = static_cast<std::size_t>(reference_.batch.length);
  losses(reference_.arrays.find("loss"), result.main.reference, reference_.batch.labels, main, length, 0);
  for (std::size_t k = 0; k < mtp.size() && k < result.mtp.size(); ++k) {
    losses(reference_.arrays.find(fmt::format("mtp.{}.loss", k)), result.mtp[k].reference, result.mtp_labels[k], mtp[k], length, k + 1);
    if (const auto* labels = reference_.arrays.find(fmt::format("mtp.{}.labels", k)))
      for (std::size_t i = 0; i < labels->values.size() && i < result.mtp_labels[k].size(); ++i)
        shard::require(labels->values[i] == static_cast<double>(result.mtp_labels[k][i]), Code::Mismatch, [&] { return fmt::format("the reference's mtp.{}.labels: should be labels rolled left {} times", k, k + 1); });
  }
  for (std::size_t s = 0; s < steps.size() && s < result.step_hidden.size(); ++s) {
    const auto* hidden = reference_.arrays.find(fmt::format("mtp_step.{}.hidden", reference_.steps[s].depth));
    const auto found = result.step_hidden[s].values();
    if (!hidden || hidden->values.size() != found.size()) continue;
    steps[s].hidden = true;
    for (std::size_t i = 0; i < found.size(); ++i) steps[s].max_abs_hidden = std::max(steps[s].max_abs_hidden, distance(hidden->values[i], static_cast<double>(found[i])));
  }
}

}  // namespace cli
