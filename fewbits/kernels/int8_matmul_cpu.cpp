// left @ right.T of int8 codes in VNNI instructions, rescaled and rounded while the sums lie in registers. See int8_matmul_cpu.py.
#include <algorithm>

#include "elements.hpp"
#include "memory.hpp"
#include "parallel.hpp"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace {
// The instruction multiplies unsigned by signed bytes and adds four products to an int32. So right is stored with 128 added,
// and 128 times the sum of a row of left is taken off again: exact, since all of it is arithmetic modulo 2^32.
constexpr long GROUP = 16;  // rows of an operand that lie side by side: one register holds four numbers of each
constexpr int ROWS = 8;     // of left in one tile
constexpr int GROUPS = 3;   // of right in one tile: 8 x 3 sums and 4 operands leave 4 of the 32 registers
constexpr long PIECE = 256; // rows of left in one piece of work

// Rows and columns as the product sees them (the contraction along the columns), `row` and `column` bytes apart.
struct Codes {
    const int8_t* x;
    long rows, columns, row, column;
};

inline void transpose(__m512i* v) {  // 16 x 16 int32
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xDD);
    }
    for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    }
}

// A packed operand: out[group][k / 4][row][k % 4] of groups of 16 rows, zeros beyond the matrix, every byte xor `flip`.
struct Packed {
    int8_t* x;
    long apart;     // bytes from group to group
    __m512i flip;
    int32_t* sums;  // of the rows, if wanted, added to what is there

    void put(long group, long quad, __m512i v) const {
        _mm512_store_si512(x + group * apart + quad * 64, _mm512_xor_si512(v, flip));
    }
    void put_sums(long group, __m512i total) const { _mm512_store_si512(sums + group * GROUP, total); }
};

inline __m512i add_bytes(__m512i total, __m512i v) { return _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), v); }

// A group of a matrix whose rows lie in one piece each.
void pack_rows(const Codes& m, long group, const Packed& out) {
    const long first = group * GROUP, rows = std::min(GROUP, m.rows - first), quads = (m.columns + 3) / 4;
    __m512i total = _mm512_setzero_si512();
    for (long quad = 0; quad < quads; quad += 16) {
        const long left = std::min(64L, m.columns - quad * 4), some = std::min(16L, quads - quad);
        const __mmask64 mask = left == 64 ? ~0ull : (1ull << left) - 1;
        __m512i v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            v[i] = i < rows ? _mm512_maskz_loadu_epi8(mask, m.x + (first + i) * m.row + quad * 4) : _mm512_setzero_si512();
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (out.sums) total = add_bytes(total, v[i]);
            if (i < some) out.put(group, quad + i, v[i]);
        }
    }
    if (out.sums) out.put_sums(group, total);
}

// Four groups of a matrix whose columns lie in one piece each: whole cache lines of 64 rows are read once.
void pack_columns(const Codes& m, long group, const Packed& out) {
    const long first = group * GROUP, rows = std::min(4 * GROUP, m.rows - first), quads = (m.columns + 3) / 4;
    const long groups = (rows + GROUP - 1) / GROUP;
    const __mmask64 mask = rows == 64 ? ~0ull : (1ull << rows) - 1;
    __m512i total[4] = {};
    for (long quad = 0; quad < quads; quad++) {
        const int8_t* from = m.x + quad * 4 * m.column + first;
        __m512i v[4], g[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            v[i] = quad * 4 + i < m.columns ? _mm512_maskz_loadu_epi8(mask, from + i * m.column) : _mm512_setzero_si512();
        __m512i low = _mm512_unpacklo_epi8(v[0], v[1]), low2 = _mm512_unpacklo_epi8(v[2], v[3]);
        __m512i high = _mm512_unpackhi_epi8(v[0], v[1]), high2 = _mm512_unpackhi_epi8(v[2], v[3]);
        // of the rows 16 L .. 16 L + 15 in lane L, a register has four; a group wants its lane of all four registers
        v[0] = _mm512_unpacklo_epi16(low, low2), v[1] = _mm512_unpackhi_epi16(low, low2);
        v[2] = _mm512_unpacklo_epi16(high, high2), v[3] = _mm512_unpackhi_epi16(high, high2);
        low = _mm512_shuffle_i32x4(v[0], v[1], 0x44), low2 = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
        high = _mm512_shuffle_i32x4(v[0], v[1], 0xEE), high2 = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
        g[0] = _mm512_shuffle_i32x4(low, low2, 0x88), g[1] = _mm512_shuffle_i32x4(low, low2, 0xDD);
        g[2] = _mm512_shuffle_i32x4(high, high2, 0x88), g[3] = _mm512_shuffle_i32x4(high, high2, 0xDD);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            if (out.sums) total[i] = add_bytes(total[i], g[i]);
            if (i < groups) out.put(group + i, quad, g[i]);
        }
    }
    if (out.sums)
        for (int i = 0; i < groups; i++) out.put_sums(group + i, total[i]);
}

// Four groups, from `group` on.
void pack(const Codes& m, long group, const Packed& out) {
    if (m.column != 1) return pack_columns(m, group, out);
    for (long g = group; g < std::min(group + 4, (m.rows + GROUP - 1) / GROUP); g++) pack_rows(m, g, out);
}

inline void put(float* to, __mmask16 mask, __m512 v) { _mm512_mask_storeu_ps(to, mask, v); }
inline void put(fp16* to, __mmask16 mask, __m512 v) {
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void put(bf16* to, __mmask16 mask, __m512 v) {  // as `store` of elements.hpp: the instruction would lose subnormals
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
    const __m512i high = _mm512_set_epi64(0, 0, 0, 0, 0x001F001D001B0019, 0x0017001500130011, 0x000F000D000B0009, 0x0007000500030001);
    _mm256_mask_storeu_epi16(to, mask, _mm512_castsi512_si256(_mm512_permutexvar_epi16(high, rounded)));
}

// total + products of four unsigned bytes of a with four signed ones of b. GCC 12 moves every sum to another register and back
// around its builtin, and some to memory: 0.8 of the speed.
inline __m512i add_products(__m512i total, __m512i a, __m512i b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
    return total;
}

// Sums of 8 rows of left and G groups of right, both packed.
template <int G>
inline void add_up(long quads, const int8_t* left, const int8_t* right, long apart, __m512i* out) {
    __m512i total[ROWS][G];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int j = 0; j < G; j++) total[i][j] = _mm512_setzero_si512();
    for (long quad = 0; quad < quads; quad++) {
        const int32_t* a = reinterpret_cast<const int32_t*>(left + quad * 64);
        __m512i b[G];
#pragma GCC unroll 3
        for (int j = 0; j < G; j++) b[j] = _mm512_load_si512(right + j * apart + quad * 64);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            __m512i one = _mm512_set1_epi32(a[i]);
#pragma GCC unroll 3
            for (int j = 0; j < G; j++) total[i][j] = add_products(total[i][j], b[j], one);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int j = 0; j < G; j++) _mm512_store_si512(out + i * G + j, total[i][j]);
}

// A tile of rows of left (at most 8) by G groups of right. sums: of the rows of left.
template <int G, class T>
void tile(long quads, const int8_t* left, const int8_t* right, long apart, const int32_t* sums, const float* row_scale,
          const float* column_scale, const float* bias, long rows, long columns, T* out, long stride) {
    __m512i total[ROWS * G];
    add_up<G>(quads, left, right, apart, total);
    for (int j = 0; j < G; j++) {
        const long some = std::min(GROUP, columns - j * GROUP);
        const __mmask16 mask = some >= GROUP ? 0xFFFF : (1u << some) - 1;
        const __m512 scale = _mm512_maskz_loadu_ps(mask, column_scale + j * GROUP);
        const __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias + j * GROUP) : _mm512_setzero_ps();
        for (int i = 0; i < std::min(long(ROWS), rows); i++) {
            __m512i exact = _mm512_sub_epi32(total[i * G + j], _mm512_set1_epi32(int(uint32_t(sums[i]) * 128u)));
            __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(row_scale[i])), scale);
            if (bias) v = _mm512_add_ps(v, added);
            put(out + i * stride + j * GROUP, mask, v);
        }
    }
}

template <class T>
void multiply(int threads, const Codes& left, const Codes& right, const float* row_scale, const float* column_scale,
              const float* bias, T* out) {
    const long quads = (left.columns + 3) / 4, apart = quads * 64, N = right.rows;
    const long above = (left.rows + GROUP - 1) / GROUP, across = (N + GROUP - 1) / GROUP;
    auto a = aligned<int8_t>(above * apart), b = aligned<int8_t>(across * apart);
    auto sums_of_rows = aligned<int32_t>(above * GROUP);
    int32_t* sums = sums_of_rows.get();
    const Packed packed_a{a.get(), apart, _mm512_setzero_si512(), sums};
    const Packed packed_b{b.get(), apart, _mm512_set1_epi8(-128), nullptr};
    const long pieces = (above + 3) / 4;
    auto arrange = [&](long piece) {
        if (piece < pieces) pack(left, piece * 4, packed_a);
        else pack(right, (piece - pieces) * 4, packed_b);
    };
    const long panels = (across + GROUPS - 1) / GROUPS, each = (left.rows + PIECE - 1) / PIECE;
    auto multiplied = [&](long piece) {
        const long panel = piece / each * GROUPS, groups = std::min(long(GROUPS), across - panel), column = panel * GROUP;
        const int8_t* from = b.get() + panel * apart;
        const float* added = bias ? bias + column : nullptr;
        const long begin = piece % each * PIECE, end = std::min(left.rows, begin + PIECE);
        for (long row = begin; row < end; row += ROWS) {
            const int8_t* mine = a.get() + row / GROUP * apart + row % GROUP * 4;
            auto run = [&](auto tile) {
                tile(quads, mine, from, apart, sums + row, row_scale + row, column_scale + column, added, end - row,
                     N - column, out + row * N + column, N);
            };
            if (groups == 3) run(tile<3, T>);
            else if (groups == 2) run(tile<2, T>);
            else run(tile<1, T>);
        }
    };
    parallel(threads, pieces + (across + 3) / 4, arrange, [] {}, panels * each, multiplied);
}
}  // namespace

EXPORT int supported() { return 1; }

EXPORT void scaled_int8_matmul(int threads, int format, const int8_t* left, long M, long left_row, long left_column,
                               const int8_t* right, long N, long right_row, long right_column, long K,
                               const float* row_scale, const float* column_scale, const float* bias, void* out) {
    const Codes a{left, M, K, left_row, left_column}, b{right, N, K, right_row, right_column};
    with_type(format, [&](auto* kind) {
        multiply(threads, a, b, row_scale, column_scale, bias, static_cast<decltype(kind)>(out));
    });
}
#else
EXPORT int supported() { return 0; }
EXPORT void scaled_int8_matmul() {}
#endif
