import { renewGenerationId, writeAcpiTables } from '../arch/x86_64/acpi/tables.js';
import { writeMpTable } from '../arch/x86_64/mptable.js';
import { writeBootGdt, writeBootPageTables } from '../arch/x86_64/page-tables.js';
import { agentArchive } from '../boot/agent-archive.js';
import { type BootEntry, loadKernel } from '../boot/load.js';
import { commandLine } from './command-line.js';
import type { ResolvedConfig } from './config.js';
import { virtioDeviceCount } from './device-config.js';
import type { Hardware } from './hardware.js';
import { gsi, virtioSlot } from './layout.js';
import type { UserDevices } from './user-devices/user-devices.js';

/** Puts a kernel and the tables that describe the machine into its memory. @returns where it begins. @throws ImageError */
export async function loadGuest(
  { ram: { memory }, flavour }: Hardware,
  config: ResolvedConfig,
  devices: UserDevices,
): Promise<BootEntry> {
  const virtioCount = virtioDeviceCount(config) + devices.virtio.length;
  const virtio = Array.from({ length: virtioCount }, (_, index) => virtioSlot(index));
  const { cpus, serial, acpi } = config;
  const entry = await loadKernel(memory, {
    kernel: config.kernel,
    initrd: config.initrd,
    initrdPrefix: config.agentProgram === undefined ? undefined : agentArchive(config.agentProgram),
    commandLine: commandLine(config, flavour, devices),
    rsdp: acpi === 'off' ? undefined : writeAcpiTables(memory, { cpus, serial, virtio }),
  });
  if (acpi !== 'off') renewGenerationId(memory);
  writeBootPageTables(memory);
  writeBootGdt(memory);
  if (acpi !== 'on') {
    // The PIT, which KVM has at pin 0, the ISA devices, and virtio's.
    const edge = [0, gsi.serial, gsi.cmos, ...virtio.map(({ gsi }) => gsi)];
    const own = devices.mmio.flatMap(({ place: { gsi }, trigger }) =>
      gsi === undefined ? [] : [{ pin: gsi, level: trigger === 'level' }],
    );
    writeMpTable(memory, cpus, [...edge.map((pin) => ({ pin, level: false })), ...own]);
  }
  return entry;
}
