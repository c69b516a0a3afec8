// SPDX-License-Identifier: Apache-2.0
// Walks the tiles that a range of pieces has to read, one macro tile at a time, so that
// the kernel always knows what comes next and can prefetch it.
#ifndef ATTN_OFFLOAD_TILE_CURSOR_H_
#define ATTN_OFFLOAD_TILE_CURSOR_H_

#include "types.h"

namespace attn_offload {
namespace {

struct Tile {
  const char* k;
  const char* v;
  int32_t position;  // logical position of the tile's first token
  int32_t begin;     // tokens [begin, end) of the tile may be read
  int32_t end;
};

struct MacroTile {
  Tile tiles[kMacroTiles];
  int32_t count;
  int32_t piece;
  int32_t block;  // where the cursor was before: a span may go on from there
  int32_t token;
  bool is_last;  // of its piece; a piece without visible keys has one empty macro tile
};

class TileCursor {
 public:
  TileCursor(const Job& job, const Span& span)
      : job_(job), piece_(span.piece), piece_end_(span.piece_end) {
    open();
    if (!span.is_begun) return;
    block_ = span.block;
    token_ = span.token;
  }

  bool next(MacroTile* macro) {
    if (piece_ == piece_end_) return false;
    macro->piece = piece_;
    macro->block = block_;
    macro->token = token_;
    macro->count = 0;
    while (macro->count < kMacroTiles && find()) {
      macro->tiles[macro->count++] = tile();
      token_ += kTile;
    }
    macro->is_last = !find();
    if (macro->is_last) {
      ++piece_;
      open();
    }
    return true;
  }

 private:
  void open() {
    if (piece_ == piece_end_) return;
    const Piece& piece = job_.pieces[piece_];
    const SequenceRef& sequence = job_.sequences[piece.rows.sequence];
    const int32_t last_row = piece.rows.row_begin + piece.rows.row_count - 1;
    const int32_t window = job_.sliding_window;
    visible_.begin =
        visible_keys(sequence, piece.rows.row_begin / job_.group, window).begin;
    visible_.end = visible_keys(sequence, last_row / job_.group, window).end;
    block_ = piece.block_begin;
    token_ = 0;
  }

  // Moves to the next tile with a visible token, which may be the current one.
  bool find() {
    for (; block_ < job_.pieces[piece_].block_end; ++block_, token_ = 0) {
      const BlockRef& ref = job_.blocks[block_];
      begin_ = clamp(visible_.begin - ref.position, 0, ref.length);
      end_ = clamp(visible_.end - ref.position, 0, ref.length);
      if (token_ + kTile <= begin_) token_ = begin_ / kTile * kTile;
      if (begin_ < end_ && token_ < end_) return true;
    }
    return false;
  }

  Tile tile() const {
    const Geometry& g = *job_.geometry;
    const BlockRef& ref = job_.blocks[block_];
    const int64_t head = job_.pieces[piece_].rows.kv_head;
    const int64_t index = token_ / kTile;
    const char* k = static_cast<const char*>(job_.input->cache) +
                    ref.block * g.block_stride + head * g.head_bytes +
                    index * (g.k_tile_bytes + g.v_tile_bytes);
    return {k, k + g.k_tile_bytes, ref.position + token_,
            clamp(begin_ - token_, 0, kTile), clamp(end_ - token_, 0, kTile)};
  }

  const Job& job_;
  int32_t piece_;
  const int32_t piece_end_;
  Visible visible_ = {0, 0};
  int32_t block_ = 0;
  int32_t token_ = 0;  // within the block, a multiple of kTile
  int32_t begin_ = 0;  // visible tokens of the block
  int32_t end_ = 0;
};

}  // namespace
}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_TILE_CURSOR_H_
