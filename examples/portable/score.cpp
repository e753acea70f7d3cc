// Scores requests with a portable model in pt2: a program without Python.
//
//   score MODEL.pt2 INPUTS.bin
//
// INPUTS.bin is a file by inputs.py: for each input of the model, in order, its type ('i' or 'f'), its number of
// dimensions, its sizes (int64 each) and its numbers. The program prints a line for each request: its candidates'
// probabilities, those of one candidate's tasks beside each other.

// All of PyTorch's headers, <torch/torch.h>, would take three times as long to compile.
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <vector>

namespace {

template <typename T>
T read_one(std::istream& file) {
  T value;
  if (!file.read(reinterpret_cast<char*>(&value), sizeof value)) throw std::runtime_error("the inputs end too early");
  return value;
}

std::vector<at::Tensor> read_inputs(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<at::Tensor> inputs;
  while (file.peek() != EOF) {
    const auto dtype = read_one<char>(file) == 'i' ? at::kLong : at::kFloat;
    std::vector<int64_t> sizes(read_one<int64_t>(file));
    for (auto& size : sizes) size = read_one<int64_t>(file);
    auto tensor = at::empty(sizes, dtype);
    if (!file.read(static_cast<char*>(tensor.data_ptr()), tensor.nbytes()))
      throw std::runtime_error("the inputs end too early");
    inputs.push_back(tensor);
  }
  return inputs;
}

}  // namespace

int main(int count, char** words) try {
  if (count != 3) throw std::runtime_error("usage: score MODEL.pt2 INPUTS.bin");
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(words[1]);
  const auto scores = model.run(read_inputs(words[2])).at(0).contiguous();
  const auto* number = scores.const_data_ptr<float>();
  for (int64_t request = 0; request < scores.size(0); ++request) {
    for (int64_t each = 0; each < scores.size(1) * scores.size(2); ++each) std::printf("%.9g ", *number++);
    std::printf("\n");
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
