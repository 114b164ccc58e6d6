// A stand-in: see README.md of gloo_stubs.
#pragma once
