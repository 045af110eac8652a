// The tile unit of processors with AMX in plain C++, for tests on any processor: palette 1, and the instructions that
// the products use, as Intel's Software Developer's Manual, volume 2, describes their operation.
//
// It is stricter than a processor: what would fault there, and what the products never mean to do (a tile used before
// it was loaded, rows that overlap), ends the program with a sentence on stderr.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

constexpr int TILES = 8, ROWS = 16, ROW_BYTES = 64;

inline std::atomic<int> configured_units{0};  // in all threads

// Float arithmetic of tdpbf16ps: denormals count as zeros and become zeros, whatever this thread's mode is.
inline float flushed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (!(bits & 0x7f800000)) bits &= 0x80000000;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float widened(uint16_t bfloat16) {
  const uint32_t bits = (uint32_t)bfloat16 << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flushed(x);
}
inline float multiply_add(float a, float b, float sum) { return flushed(__builtin_fmaf(a, b, sum)); }
inline float add(float a, float b) { return flushed(a + b); }

class Unit {
  bool configured_ = false;
  int rows_[TILES] = {}, row_bytes_[TILES] = {};
  bool filled_[TILES] = {};
  unsigned char data_[TILES][ROWS][ROW_BYTES] = {};

  static void require(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "tile unit: %s\n", what);
    std::abort();
  }
  void require_tile(int t) const {
    require(configured_, "used before it was configured");
    require(t >= 0 && t < TILES, "no such tile");
    require(rows_[t] && row_bytes_[t], "a tile without rows in the configuration");
    require(row_bytes_[t] % 4 == 0, "a row that is not made of words");
  }
  void require_stride(int t, int64_t stride) const {
    require(rows_[t] == 1 || stride >= row_bytes_[t], "rows in memory overlap");
  }
  void require_factors(int sum, int x, int w) const {
    require_tile(sum);
    require_tile(x);
    require_tile(w);
    require(sum != x && sum != w && x != w, "a tile is two operands");
    require(rows_[sum] == rows_[x], "the sums have other rows than the first factor");
    require(row_bytes_[sum] == row_bytes_[w], "the sums have other columns than the second factor");
    require(row_bytes_[x] / 4 == rows_[w], "the factors do not fit");
    require(filled_[sum] && filled_[x] && filled_[w], "a tile was used before it was loaded");
  }
  template <class T> T get(int tile, int row, int at) const {
    T value;
    std::memcpy(&value, data_[tile][row] + at * sizeof(T), sizeof(T));
    return value;
  }
  template <class T> void put(int tile, int row, int at, T value) {
    std::memcpy(data_[tile][row] + at * sizeof(T), &value, sizeof(T));
  }
  // What an instruction leaves of a tile beyond its configured rows and columns: zeros.
  void clear_beyond(int t) {
    for (int row = 0; row < ROWS; row++) {
      const int from = row < rows_[t] ? row_bytes_[t] : 0;
      std::memset(data_[t][row] + from, 0, ROW_BYTES - from);
    }
    filled_[t] = true;
  }
  void forget() {
    std::memset(data_, 0, sizeof data_);
    std::memset(filled_, 0, sizeof filled_);
  }

 public:
  // ldtilecfg
  void configure(const void* memory) {
    unsigned char c[64];
    std::memcpy(c, memory, sizeof c);
    require(c[0] == 1, "not palette 1");
    require(c[1] == 0, "a start row");
    for (int i = 2; i < 64; i++) {
      const bool reserved = i < 16 || (i >= 16 + 2 * TILES && i < 48) || i >= 48 + TILES;
      require(!reserved || !c[i], "reserved bytes of the configuration");
    }
    for (int t = 0; t < TILES; t++) {
      uint16_t bytes;
      std::memcpy(&bytes, c + 16 + 2 * t, sizeof bytes);
      row_bytes_[t] = bytes;
      rows_[t] = c[48 + t];
      require(bytes <= ROW_BYTES, "more than 64 bytes in a row");
      require(rows_[t] <= ROWS, "more than 16 rows");
      require((rows_[t] == 0) == (bytes == 0), "a tile of rows without bytes or bytes without rows");
    }
    forget();
    if (!configured_) configured_units++;
    configured_ = true;
  }
  // tilerelease
  void release() {
    forget();
    if (configured_) configured_units--;
    configured_ = false;
  }
  // tilezero
  void zero(int t) {
    require_tile(t);
    std::memset(data_[t], 0, sizeof data_[t]);
    filled_[t] = true;
  }
  // tileloadd
  void load(int t, const void* from, int64_t stride) {
    require_tile(t);
    require_stride(t, stride);
    for (int row = 0; row < rows_[t]; row++)
      std::memcpy(data_[t][row], (const char*)from + row * stride, row_bytes_[t]);
    clear_beyond(t);
  }
  // tilestored
  void store(int t, void* to, int64_t stride) const {
    require_tile(t);
    require_stride(t, stride);
    require(filled_[t], "a tile was stored before it was loaded");
    for (int row = 0; row < rows_[t]; row++) std::memcpy((char*)to + row * stride, data_[t][row], row_bytes_[t]);
  }
  // tdpbf16ps
  void dpbf16ps(int sum, int x, int w) {
    require_factors(sum, x, w);
    const int groups = row_bytes_[x] / 4, outputs = row_bytes_[sum] / 4;
    for (int m = 0; m < rows_[sum]; m++) {
      float even[ROW_BYTES / 4] = {}, odd[ROW_BYTES / 4] = {};
      for (int k = 0; k < groups; k++) {
        const float x0 = widened(get<uint16_t>(x, m, 2 * k)), x1 = widened(get<uint16_t>(x, m, 2 * k + 1));
        for (int n = 0; n < outputs; n++) {
          even[n] = multiply_add(x0, widened(get<uint16_t>(w, k, 2 * n)), even[n]);
          odd[n] = multiply_add(x1, widened(get<uint16_t>(w, k, 2 * n + 1)), odd[n]);
        }
      }
      for (int n = 0; n < outputs; n++) put(sum, m, n, add(flushed(get<float>(sum, m, n)), add(even[n], odd[n])));
    }
    clear_beyond(sum);
  }
  // tdpbssd
  void dpbssd(int sum, int x, int w) {
    require_factors(sum, x, w);
    const int groups = row_bytes_[x] / 4, outputs = row_bytes_[sum] / 4;
    for (int m = 0; m < rows_[sum]; m++)
      for (int n = 0; n < outputs; n++) {
        uint32_t total = get<uint32_t>(sum, m, n);  // wraps
        for (int k = 0; k < 4 * groups; k++)
          total += (uint32_t)(get<int8_t>(x, m, k) * get<int8_t>(w, k / 4, 4 * n + k % 4));
        put(sum, m, n, total);
      }
    clear_beyond(sum);
  }
  // For tests: all of a tile, 16 x 64 bytes; and another sign and bit in the first word of one of its rows.
  void copy(int t, void* to) const { std::memcpy(to, data_[t], sizeof data_[t]); }
  void flip(int t, int row) { put(t, row, 0, get<uint32_t>(t, row, 0) ^ 0x80400000); }
};

// That of this thread.
inline Unit& unit() {
  static thread_local Unit own;
  return own;
}

}  // namespace amx_emulation
