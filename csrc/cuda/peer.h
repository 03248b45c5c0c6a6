// Whether one device can copy straight into another's memory: asked of CUDA, then proved.
#pragma once

namespace fdg::cuda {

// Enables peer access both ways and copies a pattern across (ask once per pair). False where
// CUDA says it cannot be, or where what arrived was not what was sent (behind some IOMMUs and PCIe
// switches CUDA says yes and the copies are wrong). A device reaches itself.
bool peer_copies_work(int from, int to);

}  // namespace fdg::cuda
