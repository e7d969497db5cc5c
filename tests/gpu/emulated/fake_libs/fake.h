// What the doubles of the vendors' libraries share: they work in stream order like the real ones, on the emulated device's memory, which only
// a stream's work may touch. The test that loads a double gives it the way into a stream.
#pragma once

#include <functional>

using FakeEnqueue = void (*)(void* stream, std::function<void()> work);
/// From inside work: others' streams go on while `wait` waits.
using FakeWait = void (*)(const std::function<void()>& wait);

/// Set by the test before the first call; each double exports its own.
extern "C" __attribute__((visibility("default"))) FakeEnqueue fake_enqueue;
extern "C" __attribute__((visibility("default"))) FakeWait fake_wait;
