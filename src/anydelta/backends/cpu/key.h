// A key of plans: a row of words with everything in a call's arrays and environment that a plan depends on. Calls
// with equal keys share a plan. The first word of each part gives its length.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace anydelta {

class Key {
  public:
    void clear() { words_.clear(); }
    void push(uint64_t word) { words_.push_back(word); }
    void push(const void* data, size_t bytes) {
        const size_t before = words_.size(), words = (bytes + 7) / 8;
        words_.resize(before + words);  // the last word is padded with zeros
        if (bytes) std::memcpy(words_.data() + before, data, bytes);
    }
    void text(const char* text, size_t bytes) {
        push(bytes);
        push(text, bytes);
    }
    const std::vector<uint64_t>& words() const { return words_; }
    uint64_t hash() const {
        uint64_t h = words_.size();
        for (uint64_t w : words_) h = (h ^ w) * 0x9e3779b97f4a7c15, h ^= h >> 29;
        return h;
    }
    bool operator==(const Key& other) const { return words_ == other.words_; }

  private:
    std::vector<uint64_t> words_;
};

}  // namespace anydelta
