// Writes a newc cpio archive (Linux initramfs buffer format) from a manifest,
// so that device nodes need no privilege and the bytes depend on nothing else.
//
//   node cpio.mjs MANIFEST > archive
//
// Manifest lines, paths without a leading slash:
//   dir PATH MODE
//   file PATH MODE SOURCE [OTHER-NAME ...]    other names are hard links
//   symlink PATH TARGET
//   char PATH MODE MAJOR MINOR
import { readFileSync, writeSync } from 'node:fs'

const types = { dir: 0o040000, file: 0o100000, symlink: 0o120000, char: 0o020000 }
const align4 = (n) => (n + 3) & ~3
const chunks = []
let inode = 0

function entry({ path, mode, data = Buffer.alloc(0), links = 1, ino = ++inode, major = 0, minor = 0 }) {
  const name = Buffer.from(`${path}\0`)
  const fields = [ino, mode, 0, 0, links, 0, data.length, 0, 0, major, minor, name.length, 0]
  const header = `070701${fields.map((n) => n.toString(16).padStart(8, '0')).join('')}`
  const head = Buffer.alloc(align4(header.length + name.length))
  head.write(header, 'latin1')
  name.copy(head, header.length)
  const body = Buffer.alloc(align4(data.length))
  data.copy(body)
  chunks.push(head, body)
}

for (const line of readFileSync(process.argv[2], 'utf8').split('\n')) {
  const [type, path, ...rest] = line.trim().split(/\s+/)
  if (!type || type.startsWith('#')) continue
  if (!(type in types)) throw new Error(`unknown manifest line: ${line}`)
  if (type === 'symlink') {
    entry({ path, mode: types.symlink | 0o777, data: Buffer.from(rest[0]) })
    continue
  }
  const mode = types[type] | Number.parseInt(rest[0], 8)
  if (type === 'char') entry({ path, mode, major: Number(rest[1]), minor: Number(rest[2]) })
  else if (type === 'dir') entry({ path, mode, links: 2 })
  else {
    const names = [path, ...rest.slice(2)]
    const ino = ++inode
    // The kernel makes the first name and links the others; the last carries the data.
    names.forEach((name, i) => {
      const data = i === names.length - 1 ? readFileSync(rest[1]) : undefined
      entry({ path: name, mode, links: names.length, ino, data })
    })
  }
}
entry({ path: 'TRAILER!!!', mode: 0, ino: 0 })

const archive = Buffer.concat(chunks)
for (let at = 0; at < archive.length; ) at += writeSync(1, archive, at)
