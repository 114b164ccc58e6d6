#include "sliding_window_attention.h"
