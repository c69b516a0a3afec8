// SPDX-License-Identifier: Apache-2.0
// Serves the layers of planned steps without the interpreter. Whatever is unusual, long
// or wrong is left to memory_node/session.py, which does and says the same about all.
#include <poll.h>

#include "channel.h"
#include "plan.h"
#include "pool.h"
#include "turn.h"

namespace attn_offload {
namespace {

struct Layer {
  const AoServedLayer* shape;
  const AoServedStep* step;
  bool is_fused;
  int64_t reply_bytes;
};

// The layer that channel->frame names, if this loop serves it.
bool find_layer(const AoLayerServer& server, Layer* found) {
  const AoFrame& frame = server.channel->frame;
  if (frame.kind != AO_FRAME_LAYER || frame.layer >= server.num_layers ||
      frame.micro_batch >= server.num_micro_batches ||
      (frame.flags & ~uint32_t(AO_FLAG_WANT_LSE | AO_FLAG_FUSED)))
    return false;
  const AoServedLayer& shape = server.layers[frame.layer];
  const AoServedStep& step =
      server.steps[frame.micro_batch * server.num_groups + shape.group];
  if (step.plans == nullptr || step.number != frame.step || step.num_query_rows == 0)
    return false;
  const bool is_fused = frame.flags & AO_FLAG_FUSED;
  const int64_t num_stored = shape.stores ? step.num_tokens : 0;
  if (is_fused && (!shape.stores || step.num_query_rows != step.num_tokens))
    return false;
  const int64_t num_bytes = step.num_query_rows * shape.q_bytes +
                            num_stored * (int64_t{shape.k_bytes} + shape.v_bytes);
  if (uint64_t(num_bytes) != frame.num_bytes || num_bytes > server.max_payload_bytes)
    return false;
  int64_t row_bytes = shape.out_bytes;
  if (frame.flags & AO_FLAG_WANT_LSE) row_bytes += shape.lse_bytes;
  *found = {&shape, &step, is_fused, step.num_query_rows * row_bytes};
  return found->reply_bytes <= server.channel->out.slot_bytes;
}

int32_t store(const AoLayerServer& server, const Layer& layer, const char* payload) {
  const AoServedLayer& shape = *layer.shape;
  if (!shape.stores) return AO_OK;
  const int64_t q = shape.q_bytes, k = shape.k_bytes, v = shape.v_bytes;
  const int64_t rows = layer.step->num_query_rows, tokens = layer.step->num_tokens;
  AoStoreInput input = {};
  input.cache = shape.blocks;
  input.key = payload + (layer.is_fused ? q : rows * q);
  input.value = payload + (layer.is_fused ? q + k : rows * q + tokens * k);
  input.slot_mapping = layer.step->slots;
  input.key_stride = layer.is_fused ? q + k + v : k;
  input.value_stride = layer.is_fused ? q + k + v : v;
  input.num_tokens = tokens;
  input.source_dtype = shape.dtype;
  input.k_scale = shape.k_scale;
  input.v_scale = shape.v_scale;
  return ao_store(layer.step->pool, shape.cache, &input);
}

int32_t attend(const AoLayerServer& server, const Layer& layer, const char* payload,
               char* reply) {
  const AoServedLayer& shape = *layer.shape;
  const int64_t rows = layer.step->num_query_rows;
  AoAttendInput input = {};
  input.cache = shape.blocks;
  input.query = payload;
  input.out = reply;
  if (server.channel->frame.flags & AO_FLAG_WANT_LSE)
    input.lse = reinterpret_cast<float*>(reply + rows * shape.out_bytes);
  input.alibi_slopes = shape.alibi_slopes;
  input.query_stride = shape.q_bytes;
  if (layer.is_fused) input.query_stride += int64_t{shape.k_bytes} + shape.v_bytes;
  input.out_stride = shape.out_bytes;
  input.softmax_scale = shape.softmax_scale;
  input.soft_cap = shape.soft_cap;
  input.query_dtype = input.out_dtype = shape.dtype;
  input.k_scale = shape.k_scale;
  input.v_scale = shape.v_scale;
  const AoServedStep& step = *layer.step;
  return ao_attend(step.pool, step.plans[shape.kind], &input, server.slice_ns);
}

// True if no other session waits, and the worker still does.
bool is_alone(const AoLayerServer& server) {
  pollfd polled = {server.channel->received.socket, POLLIN | POLLRDHUP, 0};
  return __atomic_load_n(server.turn, __ATOMIC_RELAXED) == 1 &&
         poll(&polled, 1, 0) == 0;
}

// Stores and attends in a turn. An error is found again, and told, by the caller.
int32_t compute(AoLayerServer* server, const Layer& layer) {
  AoChannel& channel = *server->channel;
  const char* payload = slot_of(channel.in, channel.current);
  const int64_t begun = now_ns();
  int32_t status = store(*server, layer, payload);
  const int64_t stored = now_ns();
  server->counters.store_ns += stored - begun;
  if (status != AO_OK) return status;
  // After a slice it goes on where nobody else waits for the turn.
  do {
    status = attend(*server, layer, payload, slot_of(channel.out, channel.taken));
  } while (status == AO_UNFINISHED && is_alone(*server));
  server->counters.attend_ns += now_ns() - stored;
  return status;
}

void reply(AoLayerServer* server) {
  AoChannel& channel = *server->channel;
  const int64_t begun = now_ns();
  channel.outgoing = channel.frame;
  channel.outgoing.kind = AO_FRAME_OUT;
  channel.outgoing.num_bytes = uint64_t(server->reply_bytes);
  AoServeCounters& counters = server->counters;
  counters.bytes_sent += server->reply_bytes;
  server->reply_bytes = 0;
  ao_channel_send(&channel);
  counters.send_ns += now_ns() - begun;
}

// AO_OK: answered. AO_UNFINISHED: the frame is the caller's, who may wait for a slot or
// a turn. Or an AoServeStatus.
int32_t serve_layer(AoLayerServer* server) {
  Layer layer;
  if (!find_layer(*server, &layer) ||
      ao_channel_take(server->channel, 0) != AO_WAIT_READY ||
      !ao_turn_take(server->turn))
    return AO_UNFINISHED;
  if (!server->is_open) return AO_SERVE_REFUSED;
  // Threads wake up while this one stores.
  if (layer.step->plans[layer.shape->kind]->is_split()) layer.step->pool->expect_job();
  const int32_t status = compute(server, layer);
  if (status == AO_UNFINISHED) return AO_SERVE_UNFINISHED;
  if (status != AO_OK) return AO_SERVE_REFUSED;
  AoServeCounters& counters = server->counters;
  counters.num_layer_calls += 1;
  counters.num_attended_tokens += layer.step->num_attended_tokens;
  counters.bytes_received += int64_t(server->channel->frame.num_bytes);
  server->reply_bytes = layer.reply_bytes;
  // Before the worker runs, which may be on this CPU.
  if (!change_turn(server->turn, 1, 0)) return AO_SERVE_PASS_ON;
  reply(server);
  return AO_OK;
}

}  // namespace
}  // namespace attn_offload

using namespace attn_offload;

extern "C" int32_t ao_serve_layers(AoLayerServer* server, int32_t timeout_ms) {
  if (server->reply_bytes > 0) reply(server);
  while (true) {
    int32_t status = ao_channel_receive(server->channel, timeout_ms);
    if (status != AO_WAIT_READY) return status;
    const int64_t begun = now_ns();
    status = serve_layer(server);
    // Also of a layer that the caller goes on with; its own clock starts then.
    if (status != AO_UNFINISHED) server->counters.layer_ns += now_ns() - begun;
    if (status >= AO_SERVE_PASS_ON) return status;
    if (status != AO_OK) return AO_WAIT_READY;
  }
}
