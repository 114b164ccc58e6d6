// The C++ interface: Config, Tokenizer, ChatFormat, Mixtral, RollingKVCache, Engine, score, Trace, calibrate,
// save_packed. CMake target: mixtral::mixtral.
#pragma once

#include "checkpoint/calibrate.h"
#include "checkpoint/config_reader.h"
#include "checkpoint/folder.h"
#include "checkpoint/from_pretrained.h"
#include "checkpoint/generation_config.h"
#include "checkpoint/memory_plan.h"
#include "checkpoint/save.h"
#include "engine/engine.h"
#include "engine/sampling.h"
#include "engine/score.h"
#include "engine/trace.h"
#include "engine/trace_file.h"
#include "io/load_error.h"
#include "model/config.h"
#include "model/rolling_kv_cache.h"
#include "model/transformer.h"
#include "text/chat.h"
#include "text/chat_format.h"
#include "text/tokenizer.h"
