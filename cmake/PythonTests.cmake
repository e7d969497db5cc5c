# Tests that drive the built binary. They need only python3, but for `peers`, which runs the real packages from the
# environment that SHARDKIT_PEERS_PYTHON names and says so where there is none.
find_package(Python3 REQUIRED COMPONENTS Interpreter)

function(add_python_test name label)
  add_test(NAME ${name} COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tests/${ARGN})
  set_tests_properties(${name} PROPERTIES LABELS ${label} SKIP_RETURN_CODE 77
                       ENVIRONMENT "SHARDKIT=$<TARGET_FILE:shardkit>;SHARDKIT_TEST_DATA=${CMAKE_SOURCE_DIR}/tests/data")
endfunction()

# With the binary whose devices are emulated as NAME, with the real one as NAME_device: skipped where no device is.
function(add_device_test name)
  add_python_test(${name} gpu_emulated ${ARGN})
  set_property(TEST ${name} PROPERTY ENVIRONMENT "SHARDKIT=$<TARGET_FILE:shardkit_emulated>;SHARDKIT_TEST_DATA=${CMAKE_SOURCE_DIR}/tests/data")
  add_python_test(${name}_device gpu ${ARGN})
endfunction()

add_python_test(architecture fast architecture_test.py)
add_python_test(cli cli cli/cli_test.py)
add_python_test(layouts cli cli/layouts_test.py)
add_python_test(validate cli cli/validate_test.py)
add_python_test(families cli cli/families_test.py)
add_python_test(hdf5 cli cli/hdf5_test.py)
add_python_test(lora cli cli/lora_test.py)
add_python_test(pages pages cli/pages_test.py)
add_python_test(proof cli cli/proof_test.py)
add_python_test(quantised cli cli/quantised_test.py)
add_python_test(ranks cli cli/ranks_test.py)
add_python_test(serve cli cli/serve_test.py)
add_python_test(device_refusals cli gpu/refusals_test.py)
add_device_test(device_reshard gpu/reshard_test.py)
add_test(NAME bench_gpu_reshard COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/bench/gpu_reshard.py --mib 1 --rounds 1 --tp 2
                                        ${CMAKE_SOURCE_DIR}/tests/data/mcore/llama_untied_bf16/tp1pp1 ${CMAKE_BINARY_DIR}/bench_gpu_reshard)
set_tests_properties(bench_gpu_reshard PROPERTIES LABELS gpu_emulated ENVIRONMENT "SHARDKIT=$<TARGET_FILE:shardkit_emulated>;GPU_RESHARD=$<TARGET_FILE:gpu_reshard_emulated>")
add_device_test(device_validate gpu/validate_test.py)
add_python_test(attacks attacks attacks/attacks_test.py)
add_python_test(peers peers peers/peers_test.py)
add_python_test(peers_forward peers peers/forward_test.py)
add_python_test(peers_families peers peers/families_test.py)
add_python_test(peers_lora peers peers/lora_test.py)
add_python_test(peers_sharded_state_dict peers peers/sharded_state_dict_test.py)
add_python_test(peers_sharded_state_dict_te peers peers/sharded_state_dict_test.py --te)
add_python_test(peers_smollm2 peers peers/smollm2_test.py)
