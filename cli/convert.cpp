// shardkit reshard, convert and plan: open → describe → plan → execute → commit.
#include "cli/commands.h"
#include "cli/crew.h"
#include "cli/device.h"
#include "cli/markup.h"
#include "cli/options.h"
#include "cli/parts.h"
#include "cli/print.h"
#include "cli/receipt.h"
#include "cli/report_files.h"
#include "formats/hf/lora.h"
#include "formats/kernels.h"
#include "formats/target.h"
#include "gpu/reshard/execute.h"
#include "libshard/error.h"
#include "libshard/numeric.h"

#include <chrono>

#include <unistd.h>

namespace cli {
namespace {

struct ConvertAsk {
  std::string from, to, format, dtype, adapter, max_shard_size = "1GB", pad = "zeros", report, part;
  std::optional<std::int64_t> tp, pp, vpp, ep, etp, first, last;
  std::optional<std::string> pp_layout;
  bool force = false, no_sync = false, weights_only = false, dry_run = false, merge_lora = false;
  ModelOptions model;
  RunOptions run;
};

/// Sizes left out are kept from the source; a new pipeline forgets what only fitted the old one.
shard::Parallel wanted_layout(const ConvertAsk& ask, const formats::Checkpoint& source) {
  auto out = source.parallel.value_or(shard::Parallel{});
  const bool etp_follows = out.etp == out.tp;
  if (ask.pp || ask.vpp) {
    out.first_stage_layers = out.last_stage_layers = std::nullopt;
    out.pp_layout.clear();
  }
  if (ask.tp) out.tp = *ask.tp;
  if (ask.pp) out.pp = *ask.pp;
  if (ask.pp && *ask.pp == 1) out.vpp = 1;
  if (ask.vpp) out.vpp = *ask.vpp;
  if (ask.ep) out.ep = *ask.ep;
  out.etp = ask.etp ? *ask.etp : etp_follows ? out.tp : out.etp;
  if (ask.first) out.first_stage_layers = *ask.first;
  if (ask.last) out.last_stage_layers = *ask.last;
  if (ask.pp_layout) {
    out.pp_layout = *ask.pp_layout;
    out.first_stage_layers = out.last_stage_layers = std::nullopt;
    out.account_for_embedding = out.account_for_loss = false;
    if (!ask.vpp) out.vpp = 1;
  }
  return out;
}

shard::Pad wanted_pad(const std::string& text) { return text == "last" ? shard::Pad::Last : text == "mean" ? shard::Pad::Mean : shard::Pad::Zeros; }

formats::TargetOptions target_options(const ConvertAsk& ask, const formats::Checkpoint& source) {
  formats::TargetOptions out;
  out.format = ask.format.empty() ? source.format : ask.format;
  out.keep_spelling = ask.format.empty() || ask.format == source.format;
  out.parallel = wanted_layout(ask, source);
  out.max_shard_size = parse_size(ask.max_shard_size);
  out.force = ask.force;
  if (!ask.dtype.empty()) {
    out.dtype = shard::dtype_named(ask.dtype);
    shard::require(out.dtype && shard::castable(shard::DType::F32, *out.dtype), shard::Code::Usage,
                   [&] { return fmt::format("--dtype {}: is no floating type to cast to; f32, bf16, f16, f64, f8_e4m3 and f8_e5m2 are", ask.dtype); });
  }
  return out;
}

/// What quantised weights are dequantised to; types as narrow as theirs are not.
std::optional<shard::DType> wanted_weights(const ConvertAsk& ask) {
  const auto dtype = shard::dtype_named(ask.dtype);
  return dtype && (*dtype == shard::DType::BF16 || *dtype == shard::DType::F16 || *dtype == shard::DType::F32 || *dtype == shard::DType::F64) ? dtype : std::nullopt;
}

/// The mean row of a vocabulary tensor over its true rows, in its own type.
std::vector<std::byte> mean_row(const formats::LocalReader& reader, const shard::ShardedTensor& tensor, std::optional<shard::Index> vocab) {
  const auto rows = vocab ? std::min(*vocab, tensor.global_shape[0]) : tensor.global_shape[0];
  const auto width = static_cast<std::size_t>(shard::volume(tensor.global_shape) / tensor.global_shape[0]);
  const auto item = size_of(tensor.dtype);
  std::vector<double> sums(width);
  std::vector<std::byte> row(width * item);
  std::vector<bool> seen(static_cast<std::size_t>(rows));
  for (const auto& shard : tensor.shards)
    for (shard::Index i = shard.box.lo[0]; i < std::min(rows, shard.box.lo[0] + shard.box.size[0]); ++i) {
      if (seen[static_cast<std::size_t>(i)] || shard.box.size[1] != tensor.global_shape[1]) continue;
      seen[static_cast<std::size_t>(i)] = true;
      reader.read(shard.place.stream, shard.place.offset + static_cast<std::uint64_t>((i - shard.box.lo[0]) * shard.place.stride[0]), row);
      for (std::size_t c = 0; c < width; ++c) sums[c] += shard::value_at(row.data() + c * item, tensor.dtype);
    }
  std::vector<double> mean(width);
  for (std::size_t c = 0; c < width; ++c) mean[c] = rows ? sums[c] / static_cast<double>(rows) : 0;
  shard::cast(std::as_bytes(std::span(mean)), shard::DType::F64, row, tensor.dtype);
  return row;
}

Json dropped_json(const std::vector<formats::Dropped>& dropped) {
  auto out = Json::array();
  for (const auto& item : dropped) out.push_back({{"key", item.key}, {"why", item.why}});
  return out;
}

std::uint64_t planned_bytes(const shard::Plan& plan, bool target) {
  std::uint64_t out = 0;
  for (const auto& copy : plan.copies)
    if (target) out += copy.bytes() / size_of(copy.from_type) * size_of(copy.to_type);
    else if (copy.from_stream < shard::kMemoryStreams) out += copy.bytes();
  return out;
}

struct Outcome {
  const formats::Checkpoint& source;
  const formats::Target& target;
  const formats::TargetOptions& options;
  std::vector<formats::Dropped> dropped;
  std::vector<std::string> filled, files;
  Device device;
  gpu::reshard::Outcome run;   ///< on the CPU only the report
  double seconds;
  const shard::Report& report() const { return run.report; }
};

bool is_cut(const formats::TargetOptions& options) { return options.format == "torch_dist" || options.format == "mp_rank"; }

Json outcome_json(const ConvertAsk& ask, const Outcome& outcome) {
  auto ties = Json::array();
  for (const auto& [alias, owner] : outcome.source.logical.ties) ties.push_back({{"alias", alias}, {"owner", owner}});
  Json out{{"source", {{"path", ask.from}, {"format", outcome.source.format}, {"layout", layout_json(outcome.source.parallel)}}},
           {"target", {{"path", ask.to}, {"format", outcome.options.format}, {"layout", is_cut(outcome.options) ? layout_json(outcome.options.parallel) : Json(nullptr)}, {"files", outcome.files}}},
           {"bytes_read", outcome.report().bytes_read},
           {"bytes_written", outcome.report().bytes_written},
           {"bytes_copied_in_kernel", outcome.report().bytes_copied_in_kernel},
           {"bytes_through_device", outcome.report().bytes_through_device},
           {"device", outcome.device.name},
           {"device_why", outcome.device.why},
           {"seconds", outcome.seconds},
           {"peak_memory_bytes", peak_memory()},
           {"tensors", outcome.target.logical.tensors.size()},
           {"dropped", dropped_json(outcome.dropped)},
           {"carried", outcome.target.carried},
           {"tied", ties},
           {"padded", outcome.filled}};
  if (!outcome.device.cuda.empty())
    out["device_use"] = {{"model", outcome.device.model}, {"storage", outcome.run.storage}, {"lanes", outcome.run.sizes.lanes}, {"devices", outcome.run.sizes.devices}, {"image_bytes", outcome.run.sizes.image},
                         {"pinned_memory_bytes", outcome.run.sizes.pinned_memory}, {"device_memory_bytes", outcome.run.sizes.device_memory}};
  if (outcome.target.padded_vocab) out["padded_vocab_size"] = outcome.target.padded_vocab;
  if (!outcome.target.notes.empty()) out["notes"] = outcome.target.notes;
  return out;
}

void print_summary(const ConvertAsk& ask, const Outcome& outcome) {
  const auto& report = outcome.report();
  fmt::print(stderr, "{} {} → {}: {} tensors, {} in {:.2f} s ({}/s), {} files\n", ask.dry_run ? "would write" : "wrote", outcome.source.format, outcome.options.format,
             outcome.target.logical.tensors.size(), human_bytes(report.bytes_written), outcome.seconds,
             human_bytes(static_cast<std::uint64_t>(static_cast<double>(report.bytes_written) / std::max(outcome.seconds, 1e-6))), outcome.files.size());
  if (ask.run.device != "cpu" || ask.run.verbose) fmt::print(stderr, "device: {}{} ({})\n", outcome.device.name, outcome.device.cuda.empty() ? "" : ", " + outcome.device.model, outcome.device.why);
  if (ask.run.verbose && !ask.dry_run) {
    fmt::print(stderr, "bytes written: {} through the device, {} copied in the kernel, {} by the CPU\n", human_bytes(report.bytes_through_device), human_bytes(report.bytes_copied_in_kernel),
               human_bytes(report.bytes_written - report.bytes_through_device - report.bytes_copied_in_kernel));
    const auto& sizes = outcome.run.sizes;
    if (!outcome.device.cuda.empty())
      fmt::print(stderr, "storage: {}\nlanes: {} of two images of {} bytes, on {} device{}\n", outcome.run.storage, sizes.lanes, sizes.image, sizes.devices, sizes.devices == 1 ? "" : "s");
  }
  if (is_cut(outcome.options)) fmt::print(stderr, "layout: {} → {}\n", outcome.source.parallel ? layout_line(*outcome.source.parallel) : "unknown", layout_line(outcome.options.parallel));
  for (const auto& [alias, owner] : outcome.source.logical.ties) fmt::print(stderr, "{}\n", one_line(fmt::format("tied: {} is {}", alias, owner)));
  for (const auto& key : outcome.filled) fmt::print(stderr, "padded: new rows of {} are {}\n", one_line(key), ask.pad == "zeros" ? "zero" : ask.pad == "last" ? "copies of its last row" : "its mean row");
  for (const auto& note : outcome.target.notes) fmt::print(stderr, "note: {}\n", one_line(note));
  for (const auto& item : outcome.dropped) fmt::print(stderr, "{}\n", one_line(fmt::format("dropped: {} ({})", item.key, item.why)));
}

std::vector<formats::Dropped> all_dropped(const formats::Checkpoint& source, const formats::Target& target) {
  auto out = source.not_carried;
  for (const auto& key : source.optimizer) out.push_back({key, "optimizer state; --weights-only"});
  for (const auto& object : source.stored.objects)
    if (object.kind == "optimizer") out.push_back({object.key, "optimizer state; --weights-only"});
  out.insert(out.end(), target.dropped.begin(), target.dropped.end());
  return out;
}

/// A conversion's source, and the adapter that is merged into it; "" where none is.
struct Origin {
  std::string base, adapter;
  std::vector<std::string> notes;
};

/// --merge-lora takes the adapter that --adapter names, or the one that lies in SRC: beside its base, or alone with the base's name.
Origin origin_of(const ConvertAsk& ask) {
  shard::require(ask.merge_lora || ask.adapter.empty(), shard::Code::Usage, [] { return "--adapter: has no meaning without --merge-lora"; });
  if (!ask.merge_lora || !ask.adapter.empty()) return {ask.from, ask.adapter, {}};
  shard::require(std::filesystem::exists(ask.from), shard::Code::NotFound, [&] { return fmt::format("{}: not found", ask.from); });
  shard::require(formats::hf::is_adapter(ask.from), shard::Code::Usage, [&] { return fmt::format("--merge-lora: {} holds no adapter_config.json; --adapter names the adapter's folder", ask.from); });
  if (!formats::hf::is_bare_adapter(ask.from)) return {ask.from, ask.from, {}};
  const auto base = formats::hf::read_lora_config(ask.from).base;
  shard::require(std::filesystem::is_directory(base), shard::Code::NotFound,
                 [&] { return fmt::format("{}: its base '{}' is no folder here; give the base as SRC and this folder as --adapter", ask.from, base); });
  return {base, ask.from, {fmt::format("the base is {}, as adapter_config.json says", base)}};
}

/// --device; ranks of one host take its devices in turn.
Device device_of(const ConvertAsk& ask, const Crew* crew) {
  const auto all = choose_device(ask.run.device);
  if (!crew || all.cuda.size() < 2) return all;
  return choose_device(fmt::format("cuda:{}", all.cuda[static_cast<std::size_t>(crew->local_rank()) % all.cuda.size()]));
}

/// `crew`: the ranks that this process is one of, or null.
int run_convert(const ConvertAsk& ask, Crew* crew) {
  const auto start = std::chrono::steady_clock::now();
  const auto device = device_of(ask, crew);
  const auto budget = ask.run.limits();
  if (!formats::lies_in(ask.report, ask.to)) require_writable({{"--report", ask.report}}, ask.from);  // DST is not there yet
  auto open = ask.model.open;
  open.threads = budget.threads;
  const auto origin = origin_of(ask);
  open.adapter = origin.adapter;
  open.dequantise = wanted_weights(ask);
  const auto source = formats::open(origin.base, open);                                                   // open
  shard::require(!source.needs_weights_only || ask.weights_only, shard::Code::BadFormat,
                 [&] { return fmt::format("{}: holds optimizer state, which cannot be placed in another layout yet; --weights-only drops it", ask.from); });
  refuse(source.findings);
  auto options = target_options(ask, source);
  const bool only_bytes = source.format == "dcp" && options.format == "dcp" && !source.stored.objects.empty();
  shard::require(!source.stored.tensors.empty() || only_bytes, shard::Code::Mismatch, [&] { return fmt::format("{}: holds no tensors", ask.from); });
  const auto path = ask.dry_run ? std::filesystem::temp_directory_path() / fmt::format("shardkit-plan-{}", ::getpid()) : std::filesystem::path(ask.to);
  if (ask.dry_run && !ask.force)
    shard::require(ask.to.empty() || !std::filesystem::exists(ask.to), shard::Code::Usage, [&] { return fmt::format("{}: exists; --force replaces it", ask.to); });
  const auto part = crew ? std::optional(crew->part()) : ask.part.empty() || ask.dry_run ? std::nullopt : std::optional(parse_part(ask.part));
  if (part) options.joint = true;
  auto target = formats::create(crew ? crew->folder() : part ? joint_folder(path, *part, ask.force) : path, source, options);    // describe
  target.notes.insert(target.notes.begin(), source.notes.begin(), source.notes.end());
  target.notes.insert(target.notes.begin(), origin.notes.begin(), origin.notes.end());
  if (options.dtype && size_of(*options.dtype) < 4 && *options.dtype != shard::DType::BF16)
    target.notes.push_back(fmt::format("{} holds no larger numbers than {}: what was larger is infinite or NaN now; shardkit verify counts such numbers", shard::name(*options.dtype),
                                       *options.dtype == shard::DType::F16 ? "65504" : *options.dtype == shard::DType::F8E5M2 ? "57344" : "448"));
  const auto& filled_source = target.source ? *target.source : source;
  const formats::LocalReader reader(filled_source.logical, filled_source.files);
  const auto whole = make_plan(filled_source.logical, target.logical,                                     // plan
                              {wanted_pad(ask.pad), options.dtype.has_value(), [&](const auto& tensor) { return mean_row(reader, tensor, source.vocab); }});
  if (crew) crew->agree(whole, *target.writer);
  const auto mine = part ? std::optional(part_of(whole, part->index, part->count)) : std::nullopt;
  const auto& plan = mine ? *mine : whole;
  bool published = !ask.dry_run;
  gpu::reshard::Outcome run;
  auto& report = run.report;
  if (ask.dry_run) {
    report.bytes_read = planned_bytes(plan, false);
    report.bytes_written = planned_bytes(plan, true);
  } else {
    ProgressBar bar(ask.format.empty() ? "resharding" : "converting", ask.run.quiet || ask.run.json || (crew && part->index > 0));
    if (!device.cuda.empty()) run = gpu::reshard::execute(plan, reader, *target.writer, formats::kernels(), budget, {device.cuda, ask.run.device_limit()}, bar.callback());
    else report = execute(plan, reader, *target.writer, formats::kernels(), budget, bar.callback());     // execute
    refuse(report.findings);
    if (crew && !crew->finish(report, *target.writer, !ask.no_sync)) return 0;                           // rank 0 publishes and tells
    if (!part) target.writer->commit(report.crc32, !ask.no_sync);                                        // commit
    else if (!crew && !finish_part(path, *part, report, *target.writer, ask.force, !ask.no_sync)) {
      published = false;
      target.notes.push_back("other parts are not done yet; the last one publishes");
    }
  }
  const Outcome outcome{source, target, options, all_dropped(source, target), plan.filled, target.writer->folder().names(), device, run,
                        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()};
  if (ask.run.json) print_json(outcome_json(ask, outcome));
  else if (!ask.run.quiet) print_summary(ask, outcome);
  if (!ask.report.empty()) {
    std::optional<ReceiptSource> receipt;
    open.adapter.clear();  // what was published holds it
    if (published) receipt.emplace(ReceiptSource{filled_source, target.writer->describe(), whole, ask.pad, outcome.files, path, open});
    write_report(ask.report, outcome_json(ask, outcome), receipt, budget, ask.run.quiet || ask.run.json);
  }
  return 0;
}

/// Alone, or as one of several ranks where a launcher's environment says so. --part and --dry-run are for single processes.
int run_alone_or_together(const ConvertAsk& ask) {
  const auto launch = ask.dry_run || !ask.part.empty() ? std::nullopt : ranks::launch_of(environment());
  if (!launch) return run_convert(ask, nullptr);
  Crew crew(*launch, ask.to, ask.force, ask.run.quiet);
  return crew.run([&] { return run_convert(ask, &crew); });
}

void add_options(CLI::App& command, ConvertAsk& ask) {
  command.add_option("SRC", ask.from, "Source checkpoint")->required();
  command.add_option("DST", ask.to, "Target folder; must not exist")->required();
  const auto size = [&](const char* flag, auto& value, const char* what) { command.add_option(flag, value, what)->group("Layout"); };
  size("--tp", ask.tp, "Tensor parallel size");
  size("--pp", ask.pp, "Pipeline parallel size");
  size("--vpp", ask.vpp, "Virtual pipeline chunks a stage");
  size("--ep", ask.ep, "Expert parallel size");
  size("--etp", ask.etp, "Expert tensor parallel size");
  size("--first-stage-layers", ask.first, "Layers on the first stage");
  size("--last-stage-layers", ask.last, "Layers on the last stage");
  command.add_option("--pp-layout", ask.pp_layout, "Stages as text, e.g. 'Et*3|(tt|)*2,m|L'")->group("Layout");
  command.add_option("--pad", ask.pad, "New padding rows of the vocabulary")->check(CLI::IsMember({"zeros", "last", "mean"}));
  command.add_flag("--weights-only", ask.weights_only, "Drop optimizer state");
  command.add_flag("--force", ask.force, "Replace DST");
  command.add_flag("--no-sync", ask.no_sync, "Leave syncing to the system");
  command.add_option("--part", ask.part, "This process does the I-th of N parts, on storage shared with the others")->type_name("I/N");
  command.add_option("--report", ask.report, "Write the summary and a receipt, which verify --receipt checks, as JSON")->type_name("FILE.json");
  ask.model.add_to(command);
  ask.run.add_to(command);
}

void add_format(CLI::App& command, ConvertAsk& ask, bool required) {
  auto* option = command.add_option("--to", ask.format, "torch_dist, mp_rank, dcp, hf or hdf5")->type_name("FORMAT");
  if (required) option->required();
  command.add_option("--dtype", ask.dtype, "Cast floating tensors: bf16, f16, f32 …");
  command.add_option("--max-shard-size", ask.max_shard_size, "Largest safetensors file (default 1GB)")->type_name("SIZE");
  command.add_flag("--merge-lora", ask.merge_lora, "Add a LoRA adapter to the weights");
  command.add_option("--adapter", ask.adapter, "PEFT folder of the adapter that --merge-lora merges (default: SRC)")->type_name("DIR");
}

}  // namespace

void add_convert(CLI::App& app, Action& action) {
  const auto add = [&](const char* name, const char* what, bool format, bool required, bool dry) {
    auto ask = std::make_shared<ConvertAsk>();
    auto* command = app.add_subcommand(name, what);
    add_options(*command, *ask);
    if (format) add_format(*command, *ask, required);
    if (!dry) command->add_flag("--dry-run", ask->dry_run, "Say what would be done");
    command->callback([ask, dry, &action] {
      if (dry) ask->dry_run = true;
      action = [ask] { return run_alone_or_together(*ask); };
    });
  };
  add("reshard", "Another parallel layout, same format and keys", false, false, false);
  add("convert", "Another format (and layout)", true, true, false);
  add("plan", "What reshard or convert would do", true, false, true);
}

}  // namespace cli
