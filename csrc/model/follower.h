// The ranks of a model other than rank 0: they compute what rank 0 is called for.
#pragma once

namespace mixtral {

class MixtralImpl;

// Carries out the commands of rank 0 until it stops. model: the part of this rank, which is not rank 0. Throws
// RankError when another rank ends, is silent for too long or fails; and what went wrong here, after the others were
// told.
void follow(MixtralImpl& model);

}  // namespace mixtral
