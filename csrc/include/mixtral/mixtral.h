// The C++ interface: Config, Tokenizer, Mixtral, RollingKVCache, Engine, score, calibrate, save_quantized. CMake
// target: mixtral::mixtral.
#pragma once

#include "../../model/calibrate.h"
#include "../../model/chat.h"
#include "../../model/config.h"
#include "../../model/engine.h"
#include "../../model/load_error.h"
#include "../../model/memory_plan.h"
#include "../../model/rolling_kv_cache.h"
#include "../../model/sampling.h"
#include "../../model/save.h"
#include "../../model/score.h"
#include "../../model/tokenizer.h"
#include "../../model/transformer.h"
