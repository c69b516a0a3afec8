// SPDX-License-Identifier: Apache-2.0
// Plain C interface of the memory node's CPU library. Python mirrors it in
// native/attention.py, waits.py, channel.py and layer_loop.py; every change here bumps
// AO_ABI_VERSION.
#ifndef ATTN_OFFLOAD_ABI_H_
#define ATTN_OFFLOAD_ABI_H_

#include <stdint.h>

#define AO_ABI_VERSION 9
#define AO_EXPORT extern "C" __attribute__((visibility("default")))

// AO_FP8_E4M3 (no infinity, 448 the largest) is a cache's only: queries, outputs and
// what is stored have one of the others.
enum AoDtype { AO_BF16 = 0, AO_FP16 = 1, AO_FP32 = 2, AO_FP8_E4M3 = 3 };

enum AoStatus {
  AO_OK = 0,
  AO_UNFINISHED = 1,  // of ao_attend: call again
  AO_NO_MEMORY = -1,
  AO_BAD_GEOMETRY = -2,
  AO_BAD_BLOCK = -3,
  AO_BAD_LENGTH = -4,
  AO_BAD_SLOT = -5,
  AO_BAD_HEADS = -6,
  AO_BAD_DTYPE = -7,
  AO_BAD_ISA = -8,
};

struct AoGeometryInput {
  int64_t num_blocks;
  int32_t block_size;
  int32_t num_kv_heads;
  int32_t head_size;     // of K: a multiple of 8, 8..576
  int32_t v_head_size;   // a multiple of 8, 8..576
  int32_t dtype;         // AoDtype
  int64_t block_stride;  // bytes from block to block, a multiple of 64; 0: no gap
};

struct AoStoreInput {
  void* cache;        // the layer's blocks, 64-byte aligned
  const void* key;    // [num_tokens, num_kv_heads, head_size]
  const void* value;  // [num_tokens, num_kv_heads, v_head_size]
  const int64_t* slot_mapping;
  int64_t key_stride;  // bytes between tokens
  int64_t value_stride;
  int64_t num_tokens;
  // Of an fp8 cache only, which holds round(key / k_scale) within +-448, value alike.
  int32_t source_dtype;  // AoDtype of key and value; others hold the cache's
  float k_scale;
  float v_scale;
};

struct AoPlanInput {
  const int32_t* query_start_loc;  // [num_seqs + 1]
  const int32_t* seq_lens;         // [num_seqs]: tokens that may be read
  const int32_t* query_positions;  // [num_seqs], of first rows; null: the last tokens
  const int32_t* block_table;      // [num_seqs, max_blocks]
  const int32_t* block_indices;    // like block_table: rising, then -1; or null:
  const int32_t* first_block;      // [num_seqs], index of column 0, or null: 0
  int64_t table_stride;            // elements between rows of the tables
  int32_t num_seqs;
  int32_t max_blocks;
  int32_t num_query_heads;
  int32_t sliding_window;  // keys a row sees, its own included; 0: all up to its own
};

struct AoAttendInput {
  const void* cache;          // as in AoStoreInput
  const void* query;          // [num_tokens, num_query_heads, head_size]
  void* out;                  // [num_tokens, num_query_heads, v_head_size]
  float* lse;                 // [num_tokens, num_query_heads], or null
  const float* sinks;         // [num_query_heads], or null: not counted here
  const float* alibi_slopes;  // [num_query_heads], or null
  int64_t query_stride;       // bytes between tokens
  int64_t out_stride;
  float softmax_scale;
  float soft_cap;       // 0: none
  int32_t query_dtype;  // AoDtype
  int32_t out_dtype;    // AoDtype
  float k_scale;        // a key is k_scale times what the cache holds
  float v_scale;
};

enum AoWaitStatus {
  AO_WAIT_READY = 0,
  AO_WAIT_TIMED_OUT = 1,
  AO_WAIT_CLOSED = 2,
  AO_WAIT_INTERRUPTED = 3,  // by a signal: call again
  AO_WAIT_FAILED = 4,
};

// A counter in shared memory that one side raises and the other waits for. The struct
// is private to a side, and one thread uses it at a time.
struct AoSignal {
  uint64_t* counter;     // shared
  uint32_t* is_waiting;  // shared: the waiter blocks, or is about to
  int32_t doorbell;      // eventfd that wakes the waiter
  int32_t socket;        // anything readable here means that the peer is gone
  int64_t spin_ns;       // before blocking
  int64_t last_wait_ns;  // kept between calls; 0 at first
  uint64_t target;       // what ao_signal_wait waits for
  uint64_t seen;         // the counter when it was last read
  uint64_t posted;       // the counter as ao_signal_post left it
};

struct AoReceive {
  char* data;
  int64_t num_bytes;
  int64_t received;  // so far; 0 at first, and again when READY
  int64_t spin_ns;
  int64_t last_wait_ns;
  int32_t socket;
  int32_t stall_ms;  // longest pause after the first byte
  int32_t error;     // errno of AO_WAIT_FAILED; ETIMEDOUT where bytes came too slowly
  int64_t deadline_ns;  // of all bytes, while a call is interrupted; 0 at first
};

// What a channel may find in place of a frame, beside AoWaitStatus.
enum AoFrameStatus {
  AO_FRAME_OVERRUN = 5,    // more frames were announced than there are slots
  AO_FRAME_MALFORMED = 6,  // no header, or a slot that there is not
  AO_FRAME_TOO_LONG = 7,   // for the slots of the channel
};

enum AoFrameKind { AO_FRAME_LAYER = 2, AO_FRAME_OUT = 3 };
enum AoFrameFlag { AO_FLAG_WANT_LSE = 1, AO_FLAG_FUSED = 2, AO_FLAG_ON_DEVICE = 8 };

#define AO_FRAME_MAGIC 0x4F415631u
#define AO_MAX_SLOTS 64

// The header in front of a payload, as protocol/frames.py has it.
struct AoFrame {
  uint32_t magic;
  uint16_t kind;
  uint16_t layer;
  uint64_t step;
  uint16_t micro_batch;
  uint16_t group;
  uint32_t flags;
  uint64_t num_bytes;
};

// Shared memory of one direction. Frame n has place n modulo the number of slots, 64
// bytes: its header, then the index (uint32) of the slot with its payload.
struct AoRing {
  char* headers;
  char* slots;
  int64_t slot_stride;
  int64_t slot_bytes;
};

// One side of a channel through shared memory; private to that side. One thread sends
// and one receives at a time.
struct AoChannel {
  AoRing out;
  AoRing in;
  AoSignal sent;   // posted by this side, like released
  AoSignal freed;  // waited for, like received
  AoSignal received;
  AoSignal released;
  AoFrame outgoing;  // of the next frame that is sent
  AoFrame frame;     // of the last one that came
  uint64_t num_sent;
  uint64_t num_freed;
  uint64_t num_received;
  int32_t num_slots;
  int32_t taken;    // slot of the next frame, or -1
  int32_t current;  // slot of `frame`, or -1
  int32_t num_free;
  int32_t first_held;  // held_slots is a ring of num_slots
  int32_t num_held;
  int32_t free_slots[AO_MAX_SLOTS];
  int32_t held_slots[AO_MAX_SLOTS];  // of frames that are not freed, in order
};

// A layer of a session, for ao_serve_layers.
struct AoServedLayer {
  const struct AoCache* cache;
  void* blocks;  // as AoStoreInput's cache
  const float* alibi_slopes;
  int32_t group;    // KV cache group
  int32_t kind;     // index of its plan in a step of the group
  int32_t stores;   // 0: payloads are of q alone
  int32_t dtype;    // of payloads
  int32_t q_bytes;  // of a row
  int32_t k_bytes;
  int32_t v_bytes;
  int32_t out_bytes;
  int32_t lse_bytes;
  float softmax_scale;
  float soft_cap;
  float k_scale;
  float v_scale;
};

// A planned step of one KV group and one micro-batch.
struct AoServedStep {
  uint64_t number;
  int64_t num_tokens;
  int64_t num_query_rows;
  int64_t num_attended_tokens;
  const int64_t* slots;
  struct AoPlan* const* plans;  // by kind; null: no step was planned
  struct AoPool* pool;          // attends it
};

struct AoServeCounters {
  int64_t num_layer_calls;
  int64_t num_attended_tokens;
  int64_t bytes_received;
  int64_t bytes_sent;
  int64_t store_ns;
  int64_t attend_ns;
  int64_t send_ns;
  int64_t layer_ns;
};

struct AoLayerServer {
  AoChannel* channel;
  int32_t* turn;
  const AoServedLayer* layers;
  const AoServedStep* steps;  // [num_micro_batches, num_groups]
  int32_t num_layers;
  int32_t num_groups;
  int32_t num_micro_batches;
  int32_t is_open;  // read in a turn: the layers' blocks are mapped
  int64_t max_payload_bytes;  // stored in one turn
  int64_t slice_ns;
  int64_t reply_bytes;  // of a layer that is to be answered first; 0: of none
  AoServeCounters counters;
};

enum AoServeStatus {
  AO_SERVE_PASS_ON = 16,     // others wait for the turn: pass it on and call again
  AO_SERVE_UNFINISHED = 17,  // channel->frame is stored, and a slice of it attended
  AO_SERVE_REFUSED = 18,     // channel->frame failed, or the session was closed
};

// A layer of a worker whose rows all go to one node.
struct AoExchange {
  AoChannel* channel;
  const char* query;
  const char* key;  // null: the layer stores nothing
  const char* value;
  char* out;
  int64_t query_stride;  // bytes between rows
  int64_t key_stride;
  int64_t value_stride;
  int64_t num_rows;
  int64_t out_bytes;  // of all rows
  uint64_t step;
  int64_t packed_ns;  // what packing took, and sending after it
  int64_t sent_ns;
  int32_t q_bytes;  // of a row
  int32_t k_bytes;
  int32_t v_bytes;
  int32_t layer;
  int32_t micro_batch;
  int32_t take_ms;    // time for a slot to come free
  int32_t answer_ms;  // time for the answer, once sent
  int64_t deadline_ns;  // of what is waited for, while a call is interrupted; else 0
  int32_t is_sent;      // 0 at first, kept after an interruption
};

enum AoExchangeStatus { AO_EXCHANGE_OTHER = 16 };  // channel->frame is something else

struct AoPool;
struct AoCache;
struct AoPlan;

AO_EXPORT int32_t ao_abi_version();
AO_EXPORT const char* ao_error_text(int32_t status);
// Instruction sets that run here, separated by spaces: best first, emulations last.
AO_EXPORT const char* ao_isa_names();

// cpu_ids[0] belongs to the calling threads, which take part in their own jobs; the
// pool starts num_threads - 1 workers pinned to the others. cpu_ids may be null. Returns
// null where the host starts no more threads.
AO_EXPORT AoPool* ao_pool_create(int32_t num_threads, const int32_t* cpu_ids,
                                 int64_t spin_ns);
AO_EXPORT void ao_pool_destroy(AoPool* pool);

// isa: null picks the best that runs here.
AO_EXPORT int32_t ao_cache_create(const AoGeometryInput* input, const char* isa,
                                  AoCache** cache);
AO_EXPORT void ao_cache_destroy(AoCache* cache);
AO_EXPORT const char* ao_cache_isa(const AoCache* cache);
// Bytes of one block of one layer, keys and values, padding included.
AO_EXPORT int64_t ao_block_bytes(const AoCache* cache);

AO_EXPORT int32_t ao_store(AoPool* pool, const AoCache* cache,
                           const AoStoreInput* input);

AO_EXPORT AoPlan* ao_plan_create(const AoCache* cache);
AO_EXPORT void ao_plan_destroy(AoPlan* plan);
AO_EXPORT int32_t ao_plan_step(AoPlan* plan, const AoPool* pool,
                               const AoPlanInput* input);
// One attend at a time per plan; different plans may run on different threads. Stops
// soon after budget_ns (0: never), never without progress, and then returns
// AO_UNFINISHED: the next call with the same input goes on, to the same result.
// ao_plan_step and ao_plan_destroy abandon a layer that is not finished.
AO_EXPORT int32_t ao_attend(AoPool* pool, AoPlan* plan, const AoAttendInput* input,
                            int64_t budget_ns);

// Seconds to read `bytes` once with all threads of the pool.
AO_EXPORT double ao_read_seconds(AoPool* pool, const void* data, int64_t bytes);

// These two return an AoWaitStatus; a timeout below 0 waits for ever. Few and narrow
// arguments, because each one that Python converts costs more than the call.
// What was posted before the peer closed its socket is READY first.
AO_EXPORT int32_t ao_signal_wait(AoSignal* signal, int32_t timeout_ms);
// Fills data within timeout_ms and 1 us per byte; where it is negative, within stall_ms
// and 1 us per byte from the first one on.
AO_EXPORT int32_t ao_receive(AoReceive* call, int32_t timeout_ms);
// Raises the counter by one. What was written before is visible to a waiter that sees
// it. Never blocks.
AO_EXPORT void ao_signal_post(AoSignal* signal);

// Makes channel->taken a slot that the peer does not read: an AoWaitStatus.
AO_EXPORT int32_t ao_channel_take(AoChannel* channel, int32_t timeout_ms);
// Sends the taken slot with the header channel->outgoing. Never blocks.
AO_EXPORT void ao_channel_send(AoChannel* channel);
// Gives channel->current back and waits for the next frame: an AoWaitStatus or an
// AoFrameStatus. Its payload is in slot channel->current until the next call.
AO_EXPORT int32_t ao_channel_receive(AoChannel* channel, int32_t timeout_ms);

// A word: 0 while nobody has the turn, 1 while somebody has, 2 while others wait, too.
// Takes the turn if nobody has it; returns whether it did.
AO_EXPORT int32_t ao_turn_take(int32_t* turn);
// Says that others wait; returns whether somebody has the turn.
AO_EXPORT int32_t ao_turn_ask(int32_t* turn);
AO_EXPORT void ao_turn_set(int32_t* turn, int32_t value);

// Serves layers until a frame comes that it leaves to the caller, which then is
// channel->frame: AO_WAIT_READY. Otherwise an AoWaitStatus, an AoFrameStatus or, where
// the caller now has the turn, an AoServeStatus.
AO_EXPORT int32_t ao_serve_layers(AoLayerServer* server, int32_t timeout_ms);

// Sends a layer, unless is_sent, and waits for its output: an AoWaitStatus (READY: out
// is filled), AoFrameStatus or AoExchangeStatus. After AO_WAIT_INTERRUPTED, call again.
// Its two timeouts are in the struct; other calls on a channel have one beside it.
AO_EXPORT int32_t ao_exchange(AoExchange* call, int32_t unused);

#endif  // ATTN_OFFLOAD_ABI_H_
