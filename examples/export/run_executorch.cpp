// Generate tokens with the program of export_executorch.py, without Python.
//
//     run_executorch out/export 64 TOKEN ...      the prompt as token numbers, two or more; prints the new ones
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::EValue;

int main(int argc, char** argv) {
    if (argc < 5) {
        std::cerr << "run_executorch requires a folder, a number of new tokens and a prompt of two tokens or more\n";
        return 2;
    }
    // The states are buffers of the program; with shared arenas, prefill and decode advance the same ones.
    Module program(std::string(argv[1]) + "/tiny.pte", Module::LoadMode::File, nullptr, nullptr, nullptr, true);
    std::vector<int64_t> fresh, position;
    for (int i = 3; i < argc; ++i) fresh.push_back(std::stoll(argv[i]));
    for (int i = 0; i < std::atoi(argv[2]); ++i) {
        const auto T = static_cast<int>(fresh.size());
        const int64_t start = position.empty() ? 0 : position.back() + 1;
        position.resize(fresh.size());
        for (int t = 0; t < T; ++t) position[static_cast<size_t>(t)] = start + t;
        const auto ids = from_blob(fresh.data(), {1, T}, executorch::aten::ScalarType::Long);
        const auto places = from_blob(position.data(), {T}, executorch::aten::ScalarType::Long);
        const std::vector<EValue> inputs{ids, places};
        const auto result = program.execute(T == 1 ? "decode" : "prefill", inputs);
        if (!result.ok()) {
            std::cerr << "run_executorch: ExecuTorch error " << static_cast<int>(result.error()) << "\n";
            return 1;
        }
        const auto& logits = result->at(0).toTensor();
        const float* first = logits.const_data_ptr<float>();
        fresh = {std::max_element(first, first + logits.numel()) - first};
        std::cout << (i ? " " : "") << fresh[0] << std::flush;
    }
    std::cout << std::endl;
}
