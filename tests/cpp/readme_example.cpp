#include <mixtral/mixtral.h>

#include <iostream>

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : "models/demo";
  mixtral::Engine engine(mixtral::from_pretrained(folder), mixtral::Tokenizer(folder), {});
  mixtral::SamplingParams params;
  params.max_tokens = 32;
  const auto prompt = engine.tokenizer()->encode("In the beginning", /*add_bos=*/true);
  std::cout << engine.generate({prompt}, {params})[0].text << "\n";
}
