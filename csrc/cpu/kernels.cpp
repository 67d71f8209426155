// All CPU kernels in one instruction set. The build compiles this file once per set, with
// RODIMUS_ISA defined as the name of the set, and with the compiler flags that allow it.
#include "attention.h"
#include "elementwise.h"
#include "kernels.h"
#include "linear.h"
#include "recurrence.h"

namespace rodimus {
namespace RODIMUS_ISA {

extern const Kernels table;
const Kernels table = {
    RODIMUS_ISA_NAME, ddts_step, mixer_gates, mixer_step, mixer_norm,      conv_step,
    conv,             linear_prepare,         linear,     norm,            rope,
    add,              gate,      attention_write,         attention_scan,  attention_merge,
};

}  // namespace RODIMUS_ISA
}  // namespace rodimus
