// Generate tokens with the packages of export_aoti.py, without Python.
//
//     run_aoti out/export 64 TOKEN ...      the prompt as token numbers, two or more; prints the new ones
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

using torch::inductor::AOTIModelPackageLoader;

// Zeros of the shapes in a package's metadata: "1x256x3 1x4x32x32 ..."
std::vector<at::Tensor> new_states(AOTIModelPackageLoader& package) {
    std::vector<at::Tensor> states;
    std::istringstream shapes(package.get_metadata().at("states"));
    for (std::string shape; shapes >> shape;) {
        std::vector<int64_t> sizes;
        std::istringstream numbers(shape);
        for (std::string n; std::getline(numbers, n, 'x');) sizes.push_back(std::stoll(n));
        states.push_back(at::zeros(sizes));
    }
    return states;
}

int main(int argc, char** argv) try {
    if (argc < 5) {
        std::cerr << "run_aoti requires a folder, a number of new tokens and a prompt of two tokens or more\n";
        return 2;
    }
    const std::string folder = argv[1];
    AOTIModelPackageLoader prefill(folder + "/prefill.pt2"), decode(folder + "/decode.pt2");
    auto states = new_states(decode);
    std::vector<int64_t> fresh;
    for (int i = 3; i < argc; ++i) fresh.push_back(std::stoll(argv[i]));
    int64_t start = 0;
    for (int i = 0; i < std::atoi(argv[2]); ++i) {
        const auto T = static_cast<int64_t>(fresh.size());
        std::vector<at::Tensor> inputs{at::tensor(fresh).view({1, T}), at::arange(start, start + T)};
        inputs.insert(inputs.end(), states.begin(), states.end());
        auto& program = T == 1 ? decode : prefill;
        start += T;
        fresh = {program.run(inputs).at(0).argmax().item<int64_t>()};
        std::cout << (i ? " " : "") << fresh[0] << std::flush;
    }
    std::cout << std::endl;
} catch (const std::exception& error) {
    std::cerr << "run_aoti: " << error.what() << std::endl;
    return 1;
}
