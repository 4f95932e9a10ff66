/** CR0, CR4 and RFLAGS bits by name (SDM 3A 2.3 and 2.5). */
export const cr0 = { MP: 2, EM: 4, TS: 8, NE: 0x20, WP: 0x1_0000, PG: 0x8000_0000 } as const;
export const cr4 = {
  TSD: 4,
  OSFXSR: 0x200,
  LA57: 0x1000,
  PCIDE: 0x2_0000,
  OSXSAVE: 0x4_0000,
  SMEP: 0x10_0000,
  SMAP: 0x20_0000,
  PKE: 0x40_0000,
} as const;
export const rflags = {
  CF: 1n,
  PF: 4n,
  AF: 0x10n,
  ZF: 0x40n,
  SF: 0x80n,
  TF: 0x100n,
  IF: 0x200n,
  OF: 0x800n,
  NT: 0x4000n,
  RF: 0x1_0000n,
  VM: 0x2_0000n,
  AC: 0x4_0000n,
} as const;
/** The flags that arithmetic sets. */
export const ARITHMETIC = 0x8d5n;

export const EFER_LMA = 0x400n;
export const EFER_NXE = 0x800n;
