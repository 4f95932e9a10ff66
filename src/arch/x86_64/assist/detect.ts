import { existsSync, readFileSync } from 'node:fs';

/** How this host's KVM runs a guest kernel. */
export type KvmFlavour = 'hardware' | 'interpreted';

/**
 * `interpreted` where KVM has no VMX or SVM under it (nested PVM): guest kernel mode goes through KVM's instruction
 * emulator and needs the assist. Told by the modules that drive it, or, where /sys hides them, by the CPU's flags.
 */
export function detectKvmFlavour(root = ''): KvmFlavour {
  if (existsSync(`${root}/sys/module/kvm_intel`) || existsSync(`${root}/sys/module/kvm_amd`)) return 'hardware';
  if (existsSync(`${root}/sys/module/kvm_pvm`)) return 'interpreted';
  try {
    return /^flags\s*:.* (vmx|svm)( |$)/m.test(readFileSync(`${root}/proc/cpuinfo`, 'latin1'))
      ? 'hardware'
      : 'interpreted';
  } catch {
    return 'hardware';
  }
}
